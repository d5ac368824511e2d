// The form for the API key, which the page and the API reference share.

import { key } from "./service.js";

const $ = (id) => document.getElementById(id);

/** Show the form, after a request without a key that the service accepts. */
export function showKeyForm() {
  const wasWrong = key.get() !== "";
  key.forget();
  $("key-form").hidden = false;
  $("key-error").textContent = wasWrong ? "The service does not accept this key." : "";
  $("key-error").hidden = !wasWrong;
  if (wasWrong) $("key").select();
  $("key").focus();
}
