// Embeds a text with a client whose types are generated from /openapi.json; it must compile in strict mode.
import createClient from "openapi-fetch";

import type { paths } from "./api.js";

const [url, text] = process.argv.slice(2) as [string, string];
const client = createClient<paths>({ baseUrl: url });
const { data, error } = await client.POST("/embed", { body: { texts: [text] } });
if (error) throw new Error(JSON.stringify(error));
console.log(JSON.stringify(data));
