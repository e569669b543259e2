// Filters, the list and one item. Every text of a run enters the page as a text node: no markup is ever parsed.

const ROW_HEIGHT = 50;
const MARGIN_ROWS = 12;          // rows drawn above and below the window of the list
const LOADS_AT_ONCE = 8;
const MOST_VALUES = 12;          // of a longer filter, only values with answers are listed
const AROUND = 700;              // characters of a prompt shown around a needle
const BEGINNING = 500, ENDING = 1_000;
const PIECE = 20_000;            // characters of one block of a long text, which is laid out only where it is seen
const UNFOLDED = 200_000;        // characters that one click unfolds
const MOST_MARKS = 60;
const FACETS = ["outcome", "point", "benchmark", "task", "length", "depth"];
const MISSED = "missed";         // the outcome that means every one of an answer that is not right
const isMissed = (outcome) => outcome !== "right" && outcome !== "likelihood";
const AROUND_ADDRESS = ["beside", "differ", "q", "sort", "item"];

const byId = (id) => document.getElementById(id);
const short = (length) => (length >= 1024 && length % 1024 === 0 ? `${length / 1024}K` : String(length));
const grouped = (number) => number.toLocaleString("en");

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---- the files of the run --------------------------------------------------------------------------------------------

async function fetched(path) {
  const answer = await fetch(path, path === "run.json" ? { cache: "no-store" } : {}).catch(() => { throw new Error("The server does not answer. Run `mergeyard view` again."); });
  if (!answer.ok) throw Object.assign(new Error(`${path}: ${answer.status}`), { status: answer.status });
  return answer;
}

async function inflated(path) {
  const answer = await fetched(path);
  // a server that names the encoding has made the browser inflate the file already
  const data = new Uint8Array(await answer.arrayBuffer());
  if (data[0] !== 0x1f || data[1] !== 0x8b) return data.buffer;
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

const inflatedJson = async (path) => JSON.parse(new TextDecoder().decode(await inflated(path)));

/** Texts of all rows in chunks, each fetched once. */
class Texts {
  constructor(kind, starts, version, rows) {
    Object.assign(this, { kind, starts, version, rows, chunks: [], asked: [] });
  }
  chunkOf(row) {
    let low = 0, high = this.starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= row) low = middle; else high = middle;
    }
    return low;
  }
  load(chunk) {
    this.asked[chunk] ??= inflatedJson(`rows/${this.version}/${this.kind}-${chunk}.json.gz`)
      .then((texts) => (this.chunks[chunk] = texts))
      .catch((error) => { delete this.asked[chunk]; throw error; });
    return this.asked[chunk];
  }
  /** The text of a row, or undefined while its chunk is not here. */
  now(row) {
    const chunk = this.chunkOf(row);
    return this.chunks[chunk]?.[row - this.starts[chunk]];
  }
  async of(row) {
    if (!this.starts.length) return "";
    await this.load(this.chunkOf(row));
    return this.now(row);
  }
}

/** The answers of a run: a typed array for each column. */
class Answers {
  constructor(run, buffer) {
    this.run = run;
    this.rows = run.rows;
    run.numbers.forEach((name, index) => (this[name] = new Uint32Array(buffer, 4 * index * run.rows, run.rows)));
    run.fractions.forEach((name, index) => {
      this[name] = new Float32Array(buffer, 4 * (run.numbers.length + index) * run.rows, run.rows);
    });
    this.answers = new Texts("answers", run.answers, run.version, run.rows);
    this.thoughts = new Texts("thoughts", run.thoughts, run.version, run.rows);
    this.facets = Object.fromEntries(FACETS.map((name) => [name, this.#facet(name)]));
  }

  /** The values of a facet in order, and the number of its value for each row. */
  #facet(name) {
    const { run, rows } = this;
    const codes = new Uint32Array(rows);
    if (name === "point" || name === "outcome") {
      const values = name === "point" ? run.points.map((point) => point.name) : run.outcomes;
      return { values, codes: this[name], titles: name === "point" ? run.points.map((point) => point.title) : values };
    }
    if (name === "depth") {
      const tenth = (depth) => Math.min(9, Math.floor(10 * depth + 1e-6));
      for (let row = 0; row < rows; row++) codes[row] = Number.isNaN(this.depth[row]) ? 10 : tenth(this.depth[row]);
      const values = Array.from({ length: 11 }, (_, at) => (at < 10 ? String(10 * at) : "none"));
      return { values, codes, titles: values.map((value, at) => (at < 10 ? `${value} to ${10 * at + 10} %` : "no needle")) };
    }
    const values = [...new Set(run.cells.map((cell) => String(cell[name])))];
    if (name === "length") values.sort((a, b) => a - b);
    const code = run.cells.map((cell) => values.indexOf(String(cell[name])));
    for (let row = 0; row < rows; row++) codes[row] = code[this.cell[row]];
    return { values, codes, titles: name === "length" ? values.map((value) => (value === "0" ? "no length" : short(+value))) : values };
  }

  #key(point, cell, item) {
    this.items ??= this.item.reduce((most, item) => Math.max(most, item), 0) + 1;
    return (point * this.run.cells.length + cell) * this.items + item;
  }

  /** The rows of one item of one point: its samples, in order. */
  samples(point, cell, item) {
    if (!this.first) {
      this.first = new Map();
      for (let row = this.rows - 1; row >= 0; row--) this.first.set(this.#key(this.point[row], this.cell[row], this.item[row]), row);
    }
    const found = [];
    let row = this.first.get(this.#key(point, cell, item));
    for (; row !== undefined && row < this.rows && this.point[row] === point && this.cell[row] === cell && this.item[row] === item; row++) found.push(row);
    return found;
  }

  mean(rows) { return rows.reduce((sum, row) => sum + this.score[row], 0) / rows.length; }

  outcomeOf(row) { return this.run.outcomes[this.outcome[row]]; }

  /** The address of one answer, which a run that goes on keeps. */
  nameOf(row) {
    const cell = this.run.cells[this.cell[row]];
    return [this.run.points[this.point[row]].name, cell.benchmark, cell.task, cell.length, this.item[row], this.sample[row]].join("|");
  }

  rowNamed(name) {
    const parts = name.split("|"), [benchmark, task, length, item, sample] = parts.slice(-5);
    const point = this.facets.point.values.indexOf(parts.slice(0, -5).join("|"));
    for (const [at, cell] of this.run.cells.entries()) {
      if (cell.benchmark !== benchmark || cell.task !== task || cell.length !== +length) continue;
      const row = this.samples(point, at, +item).find((found) => this.sample[found] === +sample);
      if (row !== undefined) return row;
    }
    return -1;
  }
}

// ---- the state, which is the address ---------------------------------------------------------------------------------

const state = { beside: "", differ: false, q: "", sort: "", item: "" };
for (const name of FACETS) state[name] = new Set();

function readAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  for (const name of FACETS) state[name] = new Set(query.getAll(name));
  for (const name of AROUND_ADDRESS) state[name] = query.get(name) ?? "";
  state.differ = state.differ !== "" && state.beside !== "";
}

function writeAddress({ step = false } = {}) {
  const query = new URLSearchParams();
  for (const name of FACETS) for (const value of state[name]) query.append(name, value);
  for (const name of AROUND_ADDRESS) if (state[name]) query.set(name, state[name] === true ? "1" : state[name]);
  const address = `#${query}`;
  if (address === (location.hash || "#")) return;
  if (step) history.pushState(null, "", address); else history.replaceState(null, "", address);
}

// ---- filters ---------------------------------------------------------------------------------------------------------

let answers = null;              // Answers
let shown = new Uint32Array(0);  // the rows of the list, in order
let counts = {};                 // for each facet: how many rows each value would show
let matching = null;             // for each row, whether its text has the words sought; null without a search
let searching = 0;               // the number of the search that is going on

/** One pass over all rows: a row counts in a facet if every other facet lets it through. */
function filter() {
  const { rows, facets } = answers;
  const allowed = FACETS.map((name) => {
    if (!state[name].size) return null;
    const { values } = facets[name];
    return Uint8Array.from(values, (value) => state[name].has(value) || (name === "outcome" && state[name].has(MISSED) && isMissed(value)) ? 1 : 0);
  });
  const differing = state.differ ? differences() : null;
  const codes = FACETS.map((name) => facets[name].codes);
  const found = FACETS.map((name) => new Uint32Array(facets[name].values.length));
  const kept = new Uint32Array(rows);
  let count = 0;
  for (let row = 0; row < rows; row++) {
    if ((matching && !matching[row]) || (differing && !differing[row])) continue;
    let failed = -1, failures = 0;
    for (let at = 0; at < codes.length; at++) {
      if (allowed[at] && !allowed[at][codes[at][row]] && ++failures < 2) failed = at;
    }
    if (failures === 0) {
      kept[count++] = row;
      for (let at = 0; at < codes.length; at++) found[at][codes[at][row]]++;
    } else if (failures === 1) found[failed][codes[failed][row]]++;
  }
  counts = Object.fromEntries(FACETS.map((name, at) => [name, found[at]]));
  shown = sorted(kept.slice(0, count));
}

function sorted(rows) {
  const { score, cell, seconds, run } = answers;
  const by = {
    worst: (a, b) => score[a] - score[b],
    best: (a, b) => score[b] - score[a],
    longest: (a, b) => run.cells[cell[b]].length - run.cells[cell[a]].length,
    slowest: (a, b) => seconds[b] - seconds[a],
  }[state.sort];
  return by ? rows.sort((a, b) => by(a, b) || a - b) : rows;
}

/** For each row, whether the point it is compared with has another mean score on its item. */
function differences() {
  const { rows, point, cell, item } = answers;
  const beside = answers.facets.point.values.indexOf(state.beside);
  const found = new Uint8Array(rows);
  for (let row = 0; row < rows; ) {
    const own = answers.samples(point[row], cell[row], item[row]);
    const other = point[row] === beside ? [] : answers.samples(beside, cell[row], item[row]);
    if (other.length && answers.mean(own) !== answers.mean(other)) found.fill(1, row, row + own.length);
    row += own.length;
  }
  return found;
}

/** Searches the answers, chunk by chunk as they come; the list grows meanwhile. */
async function search() {
  const number = ++searching, sought = state.q.toLowerCase(), texts = answers.answers;
  matching = sought ? new Uint8Array(answers.rows) : null;
  if (!sought) { refresh(); return; }
  let next = 0, done = 0, redrawn = 0;
  const look = async () => {
    while (next < texts.starts.length && number === searching) {
      const chunk = next++;
      const found = await texts.load(chunk);
      if (number !== searching) return;
      found.forEach((text, at) => { if (text.toLowerCase().includes(sought)) matching[texts.starts[chunk] + at] = 1; });
      done++;
      if (performance.now() - redrawn > 300 && done < texts.starts.length) {
        refresh();
        tell(`searched ${grouped(done)} of ${grouped(texts.starts.length)} files`);
        redrawn = performance.now();
      }
    }
  };
  try {
    await Promise.all(Array.from({ length: LOADS_AT_ONCE }, look));
  } catch (error) { complain(error); return; }
  if (number === searching) refresh();
}

// ---- drawing ---------------------------------------------------------------------------------------------------------

function tell(words) {
  byId("state").className = "";
  byId("state").textContent = words;
}

function complain(error) {
  byId("state").className = "error";
  byId("state").textContent = error.message;
}

function summary() {
  const { run } = answers;
  const going = run.finished ? "" : run.renews ? "; the evaluation goes on, and this page renews itself" : "; the evaluation was going on";
  return `${grouped(run.rows)} answers of ${grouped(run.points.length)} models${going}`;
}

function drawFilters() {
  const panel = byId("filters");
  const places = new Map([...panel.querySelectorAll(".values")].map((box) => [box.dataset.facet, box.scrollTop]));
  const fields = FACETS.filter((name) => answers.facets[name].values.length > 1).map(drawFacet).filter(Boolean);
  const chosen = FACETS.some((name) => state[name].size) || state.q || state.differ;
  const focused = document.activeElement?.dataset?.value;
  panel.replaceChildren(
    ...fields,
    compareField(),
    element("button", { type: "button", disabled: !chosen, onclick: clearFilters }, "Remove all filters"),
    ...(document.body.classList.contains("filtering")
      ? [" ", element("button", { type: "button", onclick: () => showFilters(false) }, `Show ${grouped(shown.length)}`)] : []),
  );
  for (const box of panel.querySelectorAll(".values")) box.scrollTop = places.get(box.dataset.facet) ?? 0;
  if (focused) [...panel.querySelectorAll("input")].find((box) => box.dataset.value === focused)?.focus();
}

function drawFacet(name) {
  const { values, titles, codes } = answers.facets[name];
  const present = answers.facets[name].present ??= new Set(codes);
  if (present.size < 2 && !state[name].size) return null;
  const lines = [];
  if (name === "outcome") {
    const missed = counts.outcome.reduce((sum, count, at) => sum + (isMissed(values[at]) ? count : 0), 0);
    lines.push(choice(name, MISSED, "not right", missed));
  }
  const listed = (at) => present.has(at) && (present.size <= MOST_VALUES || counts[name][at] || state[name].has(values[at]));
  values.forEach((value, at) => { if (listed(at)) lines.push(choice(name, value, titles[at], counts[name][at])); });
  return element("fieldset", {}, element("legend", {}, name), element("div", { className: "values", "data-facet": name }, ...lines));
}

function choice(name, value, title, count) {
  const box = element("input", {
    type: "checkbox", checked: state[name].has(value), "data-value": `${name}=${value}`,
    onchange: () => toggle(name, value),
  });
  return element("label", { className: count ? "" : "none" }, box, element("span", {}, title), element("output", {}, grouped(count)));
}

function pointOptions(none, chosen) {
  return [element("option", { value: "", selected: !chosen }, none), ...answers.run.points.map((point) =>
    element("option", { value: point.name, selected: point.name === chosen }, point.title))];
}

function compareField() {
  const differ = element("input", { type: "checkbox", checked: state.differ, disabled: !state.beside, "data-value": "differ", onchange: toggleDiffer });
  return element("fieldset", {}, element("legend", {}, "beside"),
    element("select", { "aria-label": "the point beside", onchange: (event) => setBeside(event.target.value) }, ...pointOptions("no other point", state.beside)),
    element("label", { className: state.beside ? "" : "none" }, differ, element("span", {}, "only items that differ")));
}

const kind = (outcome) => (outcome === "right" || outcome === "partial" ? outcome : outcome === "likelihood" ? "" : "missed");
const percent = (score) => (Number.isNaN(score) ? "" : String(Math.round(1000 * score) / 10));

function badge(row) {
  const outcome = answers.outcomeOf(row);
  const mark = { right: "✓", partial: "◐", likelihood: "·" }[outcome] ?? "✗";
  return element("span", { className: `badge ${kind(outcome)}` }, `${mark} ${outcome}`);
}

const cellOf = (row) => answers.run.cells[answers.cell[row]];
const pointOf = (row) => answers.run.points[answers.point[row]];
function questionOf(row) {
  const { task, length } = cellOf(row);
  return `${task}${length ? ` at ${short(length)}` : ""}, item ${answers.item[row]}`;
}

function besideScore(row) {
  if (!state.beside) return null;
  const other = answers.samples(answers.facets.point.values.indexOf(state.beside), answers.cell[row], answers.item[row]);
  return other.length ? element("span", { className: "soft" }, `, beside ${percent(answers.mean(other))}`) : null;
}

/** The rows of the list that are in its window; the others are only height. */
function drawList() {
  const scroller = byId("scroller"), rows = byId("rows");
  rows.style.height = `${ROW_HEIGHT * shown.length}px`;
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_HEIGHT) - MARGIN_ROWS);
  const last = Math.min(shown.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW_HEIGHT) + MARGIN_ROWS);
  const open = openRow();
  const missing = new Set();
  const drawn = [];
  for (let at = first; at < last; at++) {
    const row = shown[at], text = answers.answers.now(row);
    if (text === undefined) missing.add(answers.answers.chunkOf(row));
    const score = answers.outcomeOf(row) === "partial" ? ` ${percent(answers.score[row])}` : "";
    const sample = answers.sample[row] ? `, sample ${answers.sample[row] + 1}` : "";
    drawn.push(element("div", {
      className: row === open ? "row open" : "row", style: `top: ${at * ROW_HEIGHT}px`, role: "option",
      "aria-selected": String(row === open), "aria-posinset": String(at + 1), "aria-setsize": String(shown.length),
      onclick: () => openItem(row),
    },
    element("div", { className: "about" },
      element("span", {}, badge(row), score, besideScore(row), ` ${questionOf(row)}${sample}`),
      state.point.size === 1 ? null : element("span", { className: "soft" }, pointOf(row).title)),
    element("div", { className: "answer" }, text === undefined ? "…" : text.slice(0, 160).replace(/\s+/g, " ") || "(no text)")));
  }
  rows.replaceChildren(...drawn);
  if (!shown.length) rows.replaceChildren(element("p", { className: "nothing" }, "No answer matches all filters."));
  else if (!missing.size && !performance.getEntriesByName("first list").length) performance.mark("first list");
  if (missing.size) Promise.all([...missing].map((chunk) => answers.answers.load(chunk))).then(soon, complain);
}

let planned = false;
function soon() {
  if (planned || !answers) return;
  planned = true;
  requestAnimationFrame(() => { planned = false; drawList(); });
}

function refresh() {
  filter();
  byId("run").textContent = answers.run.run;
  document.title = `${answers.run.run} · answers`;
  tell(summary());
  byId("count").textContent = shown.length === answers.rows ? "all answers" : `${grouped(shown.length)} of ${grouped(answers.rows)}`;
  byId("sort").value = state.sort;
  if (document.activeElement !== byId("search")) byId("search").value = state.q;
  drawFilters();
  drawList();
  drawItem();
}

// ---- one item --------------------------------------------------------------------------------------------------------

let prompts = new Map();         // the newest prompts, by path
let drawing = 0;

const openRow = () => (state.item ? answers.rowNamed(state.item) : -1);

async function promptOf(row) {
  const { digest, prompts: kept, benchmark } = cellOf(row);
  if (!kept) return { missing: benchmark === "perplexity" || benchmark === "lm_eval"
    ? `${benchmark} keeps no prompts and no right answers in the run.` : "The run no longer has the prompts of this task." };
  const path = `prompts/${digest}/${answers.item[row]}.json.gz`;
  if (!prompts.has(path)) {
    if (prompts.size > 20) prompts.delete(prompts.keys().next().value);
    const asked = inflatedJson(path);
    prompts.set(path, asked);
    asked.catch(() => prompts.delete(path));
  }
  try {
    return await prompts.get(path);
  } catch (error) {
    return { missing: error.status === 404 ? "The run no longer has the prompt of this item." : error.message };
  }
}

async function drawItem() {
  const number = ++drawing, panel = byId("item"), row = openRow();
  document.body.classList.toggle("reading", row >= 0);
  if (row < 0) {
    const words = state.item ? "This answer is not in the run." : "Choose an answer, or press j.";
    panel.replaceChildren(element("p", { className: "nothing" }, words));
    return;
  }
  const sides = [row, ...besideRows(row)];
  const [prompt, ...texts] = await Promise.all([
    promptOf(row),
    ...sides.map(async (side) => ({ row: side, answer: await answers.answers.of(side), thought: await answers.thoughts.of(side) })),
  ]).catch((error) => {
    complain(error);
    if (number === drawing) panel.replaceChildren(element("p", { className: "nothing" }, error.message));
    return [];
  });
  if (number !== drawing || !texts?.length) return;
  const at = shown.indexOf(row);
  const same = panel.dataset.item === state.item;
  panel.replaceChildren(
    going(row, at),
    element("h2", {}, questionOf(row)),
    ...samplesOf(row),
    element("div", { className: "sides" }, ...texts.map((side) => drawSide(side, prompt))),
    ...drawReferences(prompt),
    ...drawPrompt(row, prompt),
  );
  if (!same) panel.scrollTop = 0;
  panel.dataset.item = state.item;
}

function besideRows(row) {
  const beside = answers.facets.point.values.indexOf(state.beside);
  if (beside < 0 || beside === answers.point[row]) return [];
  const found = answers.samples(beside, answers.cell[row], answers.item[row]);
  const same = found.find((other) => answers.sample[other] === answers.sample[row]);
  return found.length ? [same ?? found[0]] : [];
}

function going(row, at) {
  return element("div", { className: "going" },
    element("button", { type: "button", onclick: closeItem }, "← list"),
    element("button", { type: "button", disabled: at === 0, onclick: () => move(-1), title: "k" }, "previous"),
    element("button", { type: "button", disabled: at === shown.length - 1, onclick: () => move(1), title: "j" }, "next"),
    element("span", { className: "soft" }, at < 0 ? "not in the list" : `${grouped(at + 1)} of ${grouped(shown.length)}`),
    element("span", { className: "spring" }),
    element("label", {}, "beside ", element("select", { onchange: (event) => setBeside(event.target.value) }, ...pointOptions("no other point", state.beside))));
}

function samplesOf(row) {
  const found = answers.samples(answers.point[row], answers.cell[row], answers.item[row]);
  if (found.length < 2) return [];
  return [element("p", { className: "facts" }, `${found.length} samples, mean ${percent(answers.mean(found))}:`, ...found.map((sample) =>
    element("button", { type: "button", disabled: sample === row, onclick: () => openItem(sample) }, `${answers.sample[sample] + 1} `, badge(sample))))];
}

function drawSide({ row, answer, thought }, prompt) {
  const facts = [
    `score ${percent(answers.score[row])}`, `${grouped(answers.tokens[row])} tokens`,
    answers.tokens_out[row] ? `${grouped(answers.tokens_out[row] - answers.tokens_thought[row])} of the answer` : "",
    answers.tokens_thought[row] ? `${grouped(answers.tokens_thought[row])} of the thought` : "",
    `${answers.seconds[row].toPrecision(3)} s`,
  ].filter(Boolean);
  const point = pointOf(row), same = point.same.length ? ` = ${point.same.join(" = ")}` : "";
  const spans = prompt.answers ? spansOf(answer, prompt.answers) : [];
  const text = element("pre", { className: kind(answers.outcomeOf(row)), tabIndex: 0 });
  text.append(...(answer ? marked(answer, 0, answer.length, spans) : [element("span", { className: "soft" }, "(no text)")]));
  return element("div", { className: "side" },
    element("h3", {}, `${point.title}${same}`),
    element("p", { className: "facts", style: "margin: 0 0 .3rem" }, badge(row), ...facts.map((fact) => element("span", {}, fact))),
    thought ? element("details", {}, element("summary", {}, `Thought, ${grouped(thought.length)} characters`), element("pre", { tabIndex: 0 }, thought)) : null,
    text);
}

function drawReferences(prompt) {
  if (!prompt.answers) return [];
  const title = prompt.answers.length > 1 ? `right answers (scorer: ${prompt.scorer})` : `right answer (scorer: ${prompt.scorer})`;
  return [element("h3", {}, title), element("ul", { className: "references" }, ...prompt.answers.map((answer) => element("li", {}, answer)))];
}

// ---- the prompt ------------------------------------------------------------------------------------------------------

function drawPrompt(row, prompt) {
  if (prompt.missing) return [element("h3", {}, "prompt"), element("p", { className: "soft" }, prompt.missing)];
  const { text, depths } = prompt;
  const spans = spansOf(text, prompt.answers);
  const box = element("div", { className: "text" });
  box.append(...folded(text, spans));
  if (prompt.answer_prefix) box.append(element("span", { className: "begun", title: "the beginning of the answer, which stands in the prompt" }, prompt.answer_prefix));
  const words = `prompt, ${grouped(prompt.tokens)} tokens, ${grouped(text.length)} characters; at most ${grouped(prompt.max_new_tokens)} new tokens`;
  return [...depthBar(cellOf(row).length, depths), element("h3", {}, words), box];
}

function depthBar(length, depths) {
  if (!depths.length) return [];
  const listed = depths.map((depth) => `${Math.round(1000 * depth) / 10} %`).join(", ");
  return [
    element("h3", {}, `${depths.length > 1 ? "needles" : "needle"} at ${listed} of the context`),
    element("div", { className: "depth", role: "img", "aria-label": `needle at ${listed}` }, ...depths.map((depth) => element("i", { style: `left: ${100 * depth}%` }))),
    element("div", { className: "ends" }, element("span", {}, "beginning"), element("span", {}, `end, ${short(length)} tokens`)),
  ];
}

/** Where the right answers stand in a text: [from, to), in order. */
function spansOf(text, references) {
  const spans = [];
  for (const reference of references) {
    let sought = [reference.trim()];
    if (!text.includes(sought[0])) {  // a reference in another form, such as JSON: its numbers, else its words
      const words = reference.match(/[\p{L}\p{N}][\p{L}\p{N}_-]{2,}/gu) ?? [];
      const numbers = words.filter((word) => /\d/.test(word));
      sought = numbers.length ? numbers : words;
    }
    for (const words of sought) {
      if (words.length < 2 && sought.length) continue;
      for (let at = text.indexOf(words), seen = 0; at >= 0 && seen < MOST_MARKS; at = text.indexOf(words, at + words.length)) {
        if (isWhole(text, at, at + words.length)) { spans.push([at, at + words.length]); seen++; }
      }
    }
  }
  spans.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  return spans.filter((span, index) => index === 0 || span[0] >= Math.max(...spans.slice(Math.max(0, index - 8), index).map((before) => before[1])));
}

const isLetter = (text, at) => at >= 0 && at < text.length && /[\p{L}\p{N}]/u.test(text[at]);
const isWhole = (text, from, to) => !(isLetter(text, from - 1) && isLetter(text, from)) && !(isLetter(text, to) && isLetter(text, to - 1));

/** A text between two places as nodes, with the spans marked. */
function marked(text, from, to, spans) {
  const nodes = [];
  let at = from;
  for (const [start, end] of spans) {
    if (start < at || end > to) continue;
    nodes.push(text.slice(at, start), element("mark", {}, text.slice(start, end)));
    at = end;
  }
  nodes.push(text.slice(at, to));
  return nodes;
}

/** The sentence around each span, as [from, to): what a haystack hides. */
function sentences(text, spans) {
  const found = [];
  for (const [start, end] of spans) {
    let from = start, to = end;
    while (from > 0 && start - from < 300 && !/[.!?\n]/.test(text[from - 1])) from--;
    while (to < text.length && to - end < 300 && !/[.!?\n]/.test(text[to - 1])) to++;
    while (from < start && /\s/.test(text[from])) from++;
    const before = found.at(-1);
    if (before && from < before[1]) before[1] = Math.max(before[1], to); else found.push([from, to]);
  }
  return found;
}

/** A text with its needles marked; the parts far from them, the beginning and the end are folded. */
function folded(text, spans) {
  const needles = sentences(text, spans);
  const open = [[0, BEGINNING], ...needles.slice(0, MOST_MARKS).map(([from, to]) => [from - AROUND, to + AROUND]), [text.length - ENDING, text.length]];
  const nodes = [];
  let at = 0;
  for (let [from, to] of open.sort((a, b) => a[0] - b[0])) {
    [from, to] = [Math.max(at, from), Math.min(text.length, to)];
    if (to <= at) continue;
    if (from - at > 200) nodes.push(fold(text, at, from, spans, needles)); else from = at;
    nodes.push(...pieces(text, from, to, spans, needles));
    at = to;
  }
  if (at < text.length) nodes.push(fold(text, at, text.length, spans, needles));
  return nodes;
}

function fold(text, from, to, spans, needles) {
  return element("button", {
    type: "button", className: "fold",
    onclick: (event) => {
      const end = Math.min(to, from + UNFOLDED);
      const rest = end < to ? [fold(text, end, to, spans, needles)] : [];
      event.currentTarget.replaceWith(...pieces(text, from, end, spans, needles), ...rest);
    },
  }, `… ${grouped(to - from)} characters …`);
}

/** A part of the text in blocks, with needles and answers marked. */
function pieces(text, from, to, spans, needles) {
  if (to - from > PIECE) {
    const line = text.lastIndexOf("\n", from + PIECE);
    const end = line > from + PIECE / 2 ? line + 1 : from + PIECE;
    const first = element("div", { className: "piece" }, ...pieces(text, from, end, spans, needles));
    return [first, ...pieces(text, end, to, spans, needles)];
  }
  const nodes = [];
  let at = from;
  for (const [start, end] of needles) {
    if (end <= at || start >= to) continue;
    const [left, right] = [Math.max(start, at), Math.min(end, to)];
    nodes.push(text.slice(at, left), element("span", { className: "needle" }, ...marked(text, left, right, spans)));
    at = right;
  }
  nodes.push(text.slice(at, to));
  return nodes;
}

// ---- what a reader does ----------------------------------------------------------------------------------------------

function changed() {
  writeAddress();
  byId("scroller").scrollTop = 0;
  refresh();
}

function toggle(name, value) {
  const chosen = state[name];
  if (chosen.has(value)) chosen.delete(value);
  else {
    if (name === "outcome" && (value === MISSED || chosen.has(MISSED))) chosen.clear();
    chosen.add(value);
  }
  changed();
}

function clearFilters() {
  for (const name of FACETS) state[name].clear();
  Object.assign(state, { differ: false, q: "" });
  byId("search").value = "";
  writeAddress();
  search();
}

function setBeside(point) {
  state.beside = point;
  if (!point) state.differ = false;
  changed();
}

function toggleDiffer() {
  if (!state.beside) return;
  state.differ = !state.differ;
  changed();
}

function openItem(row) {
  const wasOpen = state.item !== "";
  state.item = answers.nameOf(row);
  writeAddress({ step: !wasOpen });  // so that "back" closes the item
  drawList();
  drawItem();
}

function closeItem() {
  state.item = "";
  writeAddress();
  drawList();
  drawItem();
}

function move(step) {
  if (!shown.length) return;
  const at = shown.indexOf(openRow());
  const next = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + step));
  const scroller = byId("scroller"), top = next * ROW_HEIGHT;
  if (top < scroller.scrollTop) scroller.scrollTop = top;
  if (top + ROW_HEIGHT > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + ROW_HEIGHT - scroller.clientHeight;
  openItem(shown[next]);
  for (const near of [next + step, next + 2 * step]) if (shown[near] !== undefined) promptOf(shown[near]);
}

function samePointItem(step) {
  const row = openRow(), count = answers.run.points.length;
  if (row < 0) return;
  for (let away = 1; away < count; away++) {
    const point = (answers.point[row] + step * away + count * away) % count;
    const [found] = answers.samples(point, answers.cell[row], answers.item[row]);
    if (found !== undefined) { openItem(found); return; }
  }
}

function unfold() {
  for (const details of byId("item").querySelectorAll("details")) details.open = true;
  for (const button of byId("item").querySelectorAll(".fold")) button.click();
}

function showFilters(open) {
  document.body.classList.toggle("filtering", open);
  byId("show-filters").setAttribute("aria-expanded", String(open));
  drawFilters();
}

function escape() {
  if (document.body.classList.contains("filtering")) showFilters(false);
  else if (state.item) closeItem();
  else clearFilters();
}

const KEYS = {
  j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
  "]": () => samePointItem(1), "[": () => samePointItem(-1),
  "/": () => byId("search").focus(), m: () => toggle("outcome", MISSED), d: toggleDiffer, u: unfold,
  Escape: escape, "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (!answers || event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target.matches("input[type=search], select")) {
    if (event.key === "Escape" || event.key === "Enter") { event.target.blur(); event.preventDefault(); }
    return;
  }
  if (event.target.matches("#item, #item *") && event.key.startsWith("Arrow")) return;  // there they scroll
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

let typing = 0;
byId("search").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    state.q = event.target.value.trim();
    writeAddress();
    byId("scroller").scrollTop = 0;
    search();
  }, 150);
});
byId("sort").addEventListener("change", (event) => { state.sort = event.target.value; changed(); });
byId("scroller").addEventListener("scroll", soon, { passive: true });
byId("show-filters").addEventListener("click", () => showFilters(!document.body.classList.contains("filtering")));
byId("show-help").addEventListener("click", () => byId("help").showModal());
addEventListener("resize", soon);
for (const name of ["hashchange", "popstate"]) addEventListener(name, () => { if (answers) { readAddress(); search(); } });

async function load(run) {
  answers = new Answers(run, await inflated(`rows/${run.version}/numbers.bin.gz`));
  prompts = new Map();
  await search();
}

async function renew() {
  try {
    const run = await (await fetched("run.json")).json();
    if (run.version !== answers.run.version || run.finished !== answers.run.finished) await load(run);
    if (run.finished) return;
  } catch (error) { complain(error); }
  setTimeout(renew, 1000 * answers.run.renews);
}

readAddress();
try {
  await load(await (await fetched("run.json")).json());
  if (answers.run.renews && !answers.run.finished) setTimeout(renew, 1000 * answers.run.renews);
} catch (error) { complain(error); }
