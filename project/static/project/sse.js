// Server-sent events from a fetch: EventSource can only GET, and reconnects by itself, which would pay twice.

/** Turns pieces of text, cut anywhere, into whole frames `{ event, data }`. Lines may end with LF, CRLF or CR. */
export class FrameParser {
  #line = "";
  #afterCR = false;
  #event = "";
  #data = [];

  /** The frames that `text` completes. */
  push(text) {
    if (text === "") return [];
    // A CRLF cut in two: its CR has ended the line already.
    const rest = this.#afterCR && text[0] === "\n" ? text.slice(1) : text;
    this.#afterCR = text.endsWith("\r");
    const lines = (this.#line + rest).split(/\r\n|\r|\n/);
    this.#line = lines.pop();
    return lines.map((line) => this.#take(line)).filter(Boolean);
  }

  #take(line) {
    if (line === "") return this.#frame();
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name === "event") this.#event = value;
    if (name === "data") this.#data.push(value);
  }

  #frame() {
    const frame = { event: this.#event || "message", data: this.#data.join("\n") };
    const empty = !this.#event && !this.#data.length;
    this.#event = "";
    this.#data = [];
    return empty ? undefined : frame;
  }
}

/** The frames of a response's body, as they arrive. Leaving the loop early closes the connection. */
export async function* frames(body) {
  const parser = new FrameParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
