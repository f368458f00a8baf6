// The chat page: one conversation, kept in memory and sent whole with every question.

import { frames } from "./sse.js";

// gettext, ngettext and interpolate are Django's, of the JavaScriptCatalog that the page loads first.

const { chatUrl, usageUrl, loginUrl, csrfToken } = document.body.dataset;
const language = document.documentElement.lang;
const byId = (id) => document.getElementById(id);
const messages = byId("messages");
const form = byId("composer");
const prompt = byId("prompt");
const profile = byId("profile");

const CUT = gettext("The connection was lost before the answer was complete.");
const UNREACHABLE = gettext("The server cannot be reached. Please check your connection and try again.");
const GARBLED = gettext("The server sent something this page does not understand.");

const history = []; // { id, role, content }: what the next question is sent with
let count = 0;
let running = null; // the AbortController of the answer being written

/** Something to tell the reader, in a sentence. */
class Failure extends Error {
  constructor(message, { code, retryAfter } = {}) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

// ---- talking to the server

async function call(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Failure(UNREACHABLE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = (await response.json().catch(() => null)) ?? {};
  const unsaid = gettext("The server refused the request (status %s). Please reload the page.");
  return new Failure(body.error || interpolate(unsaid, [response.status]), body);
}

/** Asks, and yields the pieces of the answer; returns only if it is complete. */
async function* answer(turns, signal) {
  const response = await call(chatUrl, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRFToken": csrfToken },
    body: JSON.stringify({ messages: turns, profile: profile.value }),
    signal,
  });
  try {
    for await (const frame of frames(response.body)) {
      if (frame.event === "token") yield parsed(frame);
      if (frame.event === "usage") showUsed(parsed(frame));
      if (frame.event === "error") throw failed(parsed(frame));
      if (frame.event === "done") return;
    }
  } catch (error) {
    if (error instanceof Failure) throw error;
    if (!signal.aborted) console.warn(error);
  }
  throw new Failure(CUT);
}

function parsed(frame) {
  try {
    return JSON.parse(frame.data);
  } catch {
    throw new Failure(GARBLED);
  }
}

function failed({ message, ...details }) {
  return new Failure(message || GARBLED, details);
}

// ---- one question and its answer

async function ask(text) {
  clearError();
  document.querySelectorAll(".message.unsent").forEach((bubble) => bubble.remove());
  const question = turn("user", text);
  const asked = addBubble("user", text);
  const reply = turn("assistant", "");
  const bubble = addBubble("assistant", "");
  const { signal } = (running = new AbortController());
  showRunning();
  try {
    for await (const piece of answer([...history, question], signal)) {
      reply.content += piece;
      write(bubble, piece);
    }
    history.push(question, reply);
  } catch (error) {
    if (signal.aborted) stopped(question, reply, bubble);
    else broken(error, question, reply, asked, bubble);
    // What was held for the rest of the answer is given back a moment later.
    setTimeout(loadUsage, 1000);
  } finally {
    running = null;
    showRunning();
  }
}

function turn(role, content) {
  count += 1;
  return { id: `m${count}`, role, content };
}

function stopped(question, reply, bubble) {
  mark(bubble, "stopped", gettext("stopped"));
  history.push(question);
  if (reply.content) history.push(reply);
}

function broken(error, question, reply, asked, bubble) {
  showError(error);
  if (reply.content) {
    mark(bubble, "incomplete", gettext("incomplete"));
    history.push(question);
    return;
  }
  // Nothing was answered: the question goes back to be sent again, and stays out of the history.
  bubble.remove();
  mark(asked, "unsent", gettext("not answered"));
  if (!prompt.value) prompt.value = question.content;
  fit();
}

// ---- showing

function addBubble(role, text) {
  const bubble = document.createElement("article");
  bubble.className = `message ${role}`;
  bubble.setAttribute("aria-label", role === "user" ? gettext("You") : gettext("Answer"));
  const body = document.createElement("p");
  body.append(text);
  bubble.append(body);
  byId("hint").hidden = true;
  messages.append(bubble);
  messages.scrollTop = messages.scrollHeight;
  return bubble;
}

/** Makes a change, and keeps the conversation's end in view unless the reader has scrolled away from it. */
function keepingEnd(change) {
  const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 48;
  change();
  if (atEnd) messages.scrollTop = messages.scrollHeight;
}

function write(bubble, piece) {
  keepingEnd(() => bubble.firstChild.append(piece));
}

function mark(bubble, state, label) {
  const note = document.createElement("small");
  note.textContent = label;
  bubble.classList.add(state);
  keepingEnd(() => bubble.append(note));
}

function showRunning() {
  const busy = running !== null;
  byId("send").disabled = byId("send").hidden = busy;
  byId("stop").disabled = byId("stop").hidden = !busy;
  // A screen reader waits for the whole answer instead of reading every word.
  messages.setAttribute("aria-busy", busy);
  document.querySelector(".message.writing")?.classList.remove("writing");
  if (busy) messages.lastElementChild.classList.add("writing");
  else prompt.focus();
}

function clearError() {
  byId("error").hidden = true;
  byId("error").replaceChildren();
}

function showError(error) {
  const known = error instanceof Failure;
  if (!known) console.error(error);
  const parts = [known ? error.message : GARBLED];
  if (error.retryAfter) {
    parts.push(" ", interpolate(gettext("You can try again %s."), [soon(error.retryAfter)]));
  }
  if (error.code === "not_authenticated") parts.push(" ", loginLink());
  byId("error").replaceChildren(...parts);
  keepingEnd(() => (byId("error").hidden = false));
}

function loginLink() {
  const link = document.createElement("a");
  link.href = loginUrl;
  link.textContent = gettext("Log in");
  return link;
}

/** "in 30 seconds", in the page's language. */
function soon(seconds) {
  const time = new Intl.RelativeTimeFormat(language);
  if (seconds < 120) return time.format(Math.ceil(seconds), "second");
  if (seconds < 7200) return time.format(Math.ceil(seconds / 60), "minute");
  return time.format(Math.ceil(seconds / 3600), "hour");
}

const number = (value) => value.toLocaleString(language);

// ---- today's budget

let budget = {}; // the last answer of /api/usage

async function loadUsage() {
  try {
    const response = await call(`${usageUrl}?profile=${encodeURIComponent(profile.value)}`);
    budget = await response.json();
    showRemaining(budget.remainingToday);
  } catch (error) {
    byId("remaining").textContent = "";
    byId("meter").hidden = true;
    if (error.code === "not_authenticated") showError(error);
  }
}

function showUsed({ totalTokens, remainingToday }) {
  const used = ngettext("Last answer used %s token", "Last answer used %s tokens", totalTokens);
  byId("last").textContent = interpolate(used, [number(totalTokens)]);
  showRemaining(remainingToday);
}

function showRemaining(remaining) {
  const { dailyTokenLimit: limit, resetsAt } = budget;
  const text = limit
    ? gettext("%(left)s of %(limit)s tokens left today (resets at %(time)s)")
    : gettext("%(left)s tokens left today");
  const said = { left: number(remaining), limit: number(limit ?? 0), time: resetsAt && clock(resetsAt) };
  byId("remaining").textContent = interpolate(text, said, true);
  byId("meter").hidden = !limit;
  byId("meter").style.setProperty("--left", limit ? Math.max(0, Math.min(1, remaining / limit)) : 0);
}

function clock(time) {
  return new Date(time).toLocaleTimeString(language, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
}

// ---- what the reader does

function fit() {
  keepingEnd(() => {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight + 2}px`; // and its border
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || !text.trim()) return;
  prompt.value = "";
  fit();
  ask(text);
});

prompt.addEventListener("keydown", (event) => {
  // While composing, as in Chinese or Japanese, Enter chooses a word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

prompt.addEventListener("input", fit);
profile.addEventListener("change", loadUsage);
byId("stop").addEventListener("click", () => running?.abort());

loadUsage();
