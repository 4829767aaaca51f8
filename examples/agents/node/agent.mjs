// An agent in JavaScript: OpenAI's package for node, with a tool, in a loop. It knows nothing of
// gspo. OpenAI's client reads OPENAI_BASE_URL and OPENAI_API_KEY.
//
//     node agent.mjs MODEL QUESTION LETTERS
import OpenAI from "openai";

const [model, question, letters] = process.argv.slice(2);
const tools = [
  {
    type: "function",
    function: {
      name: "look_up",
      description: "The letter that belongs to a digit.",
      parameters: {
        type: "object",
        properties: { key: { type: "integer" } },
        required: ["key"],
      },
    },
  },
];
const MOST_TURNS = 3;

const client = new OpenAI();
const messages = [{ role: "user", content: question }];
for (let turn = 0; turn < MOST_TURNS; turn++) {
  const response = await client.chat.completions.create({ model, messages, tools, max_tokens: 80 });
  const { message } = response.choices[0];
  messages.push(message);
  if (!message.tool_calls) {
    console.log(message.content);
    break;
  }
  for (const call of message.tool_calls) {
    const { key } = JSON.parse(call.function.arguments);
    const content = letters[key] ?? "key must be a digit";
    messages.push({ role: "tool", tool_call_id: call.id, content });
  }
}
