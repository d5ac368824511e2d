// Embeds TEXT with a released client of each API, at its defaults, and prints the vectors as JSON.
import { InferenceClient } from "@huggingface/inference";
import { CohereClient } from "cohere-ai";
import { Ollama } from "ollama";
import OpenAI from "openai";

const [url, text] = process.argv.slice(2);

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const ollama = new Ollama({ host: url });
const cohere = new CohereClient({ environment: url, token: "none" });
const huggingface = new InferenceClient();

const vectors = {
  openai: (await openai.embeddings.create({ model: "any", input: text })).data[0].embedding,
  ollama: (await ollama.embed({ model: "any", input: text })).embeddings[0],
  cohere: (await cohere.v2.embed({ model: "any", inputType: "search_document", embeddingTypes: ["float"], texts: [text] })).embeddings
    .float[0],
  huggingface: await huggingface.featureExtraction({ endpointUrl: url, inputs: text }),
};
console.log(JSON.stringify(vectors));
