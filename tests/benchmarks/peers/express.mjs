// A relay as a Node developer writes it today: Express, the openai package, a frame for each delta. No accounting.
import express from "express";
import OpenAI from "openai";

const openai = new OpenAI({ apiKey: "sk-benchmarks", baseURL: process.env.OPENAI_BASE_URL });
const app = express();
app.use(express.json());

app.post("/api/chat", async (request, response) => {
  const frame = (event, data) => response.write(`event: ${event}\ndata: ${data}\n\n`);
  const leaving = new AbortController();
  response.on("close", () => leaving.abort());
  response.set({ "Content-Type": "text/event-stream", "Cache-Control": "no-cache" });
  response.flushHeaders();
  frame("start", "");
  const heartbeat = setInterval(() => frame("ping", ""), 15_000);
  try {
    const messages = request.body.messages.map(({ role, content }) => ({ role, content }));
    const answer = await openai.chat.completions.create(
      { model: "gpt-4o-mini", messages, max_tokens: 400, stream: true, stream_options: { include_usage: true } },
      { signal: leaving.signal },
    );
    for await (const chunk of answer) {
      const text = chunk.choices[0]?.delta?.content;
      if (text) frame("token", JSON.stringify(text));
    }
    frame("done", "");
  } catch (error) {
    if (!leaving.signal.aborted) frame("error", JSON.stringify({ message: "AI request failed" }));
  } finally {
    clearInterval(heartbeat);
    response.end();
  }
});

app.listen(Number(process.env.PORT), "127.0.0.1");
