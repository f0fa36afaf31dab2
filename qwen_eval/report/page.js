
"use strict";
(() => {
  const PAGE = 100;
  const [ID, GROUP, GOLD, SHARED, REST, ANSWERS, READ, READ_UPSTREAM, SCORE, SCORE_UPSTREAM, FLAGS, TOKENS] = Array(12).keys();
  const NONE = "–";

  // Text of a model only ever passes through here: textContent, never innerHTML.
  const el = (tag, props = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(props)) {
      if (key === "text") node.textContent = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== null) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };

  // --- theme ---
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  // --- tables: sort by a click on the header, filter by words ---
  const sortKey = (cell) => (cell.dataset.v === undefined ? null : Number(cell.dataset.v));
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const compare = (a, b) => {
    const [x, y] = [sortKey(a), sortKey(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x === null ? 1 : -1;
    return collator.compare(a.textContent, b.textContent);
  };
  for (const article of document.querySelectorAll(".table")) {
    const body = article.querySelector("tbody");
    const heads = [...article.querySelectorAll("th")];
    heads.forEach((head, column) =>
      head.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending" || (head.classList.contains("n") && !head.hasAttribute("aria-sort"));
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const isEmpty = (row) => row.children[column].textContent === NONE;
        const rows = [...body.rows];
        rows.sort((a, b) => {
          if (isEmpty(a) !== isEmpty(b)) return isEmpty(a) ? 1 : -1; // what is missing stays at the end
          return (down ? -1 : 1) * compare(a.children[column], b.children[column]);
        });
        body.append(...rows);
      })
    );
    article.querySelector(".filter")?.addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }

  // --- folded parts open for a link to them, and for print ---
  const reveal = (node) => {
    for (let part = node; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    node?.scrollIntoView();
  };
  const named = () => document.getElementById(location.hash.slice(1));
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((part) => {
    part.open = true;
    part.dataset.folded = "true";
  }));
  addEventListener("afterprint", () => document.querySelectorAll("details[data-folded]").forEach((part) => {
    part.open = false;
    delete part.dataset.folded;
  }));

  // --- samples ---
  const place = document.getElementById("browser");
  if (!place) {
    addEventListener("hashchange", () => reveal(named()));
    if (location.hash) reveal(named());
    root.dataset.ready = "true";
    return;
  }
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const run of data.runs) {
    let before = "";
    for (const row of run.rows) {
      row.prompt = before = before.slice(0, row[SHARED]) + row[REST];
      row.run = run;
    }
  }
  const byKey = new Map(data.runs.map((run) => [run.key, run]));
  const asked = data.runs.filter((run) => !run.is_baseline); // a baseline is only ever a reference
  const EVERY = { key: "", task: "all", label: "runs", variant: "", rows: asked.flatMap((run) => run.rows) };
  const name = (run) => `${run.task} · ${run.label} ${run.variant}`;
  // `reference` is what `run` is held against, `before` its samples by id
  const state = { run: asked[0], reference: null, filter: "all", group: "", language: "", words: "", page: 0, current: null, before: new Map() };

  const has = (row, flag) => row[FLAGS].includes(flag);
  const twin = (row) => state.before.get(row[ID]);
  const moved = (row) => {
    const first = twin(row);
    return first && first[SCORE] !== null && row[SCORE] !== null ? row[SCORE] - first[SCORE] : 0;
  };
  const words = (row) => JSON.stringify(row[ANSWERS].map(([, answer]) => answer.texts ?? null));
  const isReworded = (row) => {
    const first = twin(row);
    if (!first || moved(row) !== 0) return false;
    return has(first, "rewritten") || (!state.reference.is_baseline && words(first) !== words(row));
  };
  const isChinese = (row) => (row.chinese ??= /[\u3400-\u9fff]/.test(row.prompt.slice(-500)));
  const FILTERS = {
    all: ["all", () => true],
    wrong: ["wrong", (row) => row[SCORE] !== null && row[SCORE] < 1],
    right: ["right", (row) => row[SCORE] === 1],
    truncated: ["truncated", (row) => has(row, "truncated")],
    no_answer: ["no answer", (row) => has(row, "no_answer")],
    looping: ["looping", (row) => has(row, "looping") || has(row, "empty")],
    extractors: ["extractors disagree", (row) => row[SCORE_UPSTREAM] !== null && row[READ] !== row[READ_UPSTREAM]],
    flips: ["changed", (row) => moved(row) !== 0],
    lost: ["lost", (row) => moved(row) < 0],
    gained: ["gained", (row) => moved(row) > 0],
    reworded: ["reworded", isReworded],
  };
  const NEEDS_REFERENCE = new Set(["flips", "lost", "gained", "reworded"]);

  const select = (label, options, onchange) => {
    const node = el("select", { "aria-label": label, onchange });
    options.forEach(([value, text]) => node.append(el("option", { value, text })));
    return node;
  };
  const runBox = select("Run", asked.map((run) => [run.key, name(run)]), () => pick(byKey.get(runBox.value) ?? EVERY));
  if (asked.length > 1) runBox.append(el("option", { value: "", text: `all ${asked.length} runs` }));
  const otherBox = select("Compare with", [], () => against(byKey.get(otherBox.value) ?? null));
  const groupBox = select("Group", [], () => show({ group: groupBox.value }));
  const languages = [["", "every language"], ["chinese", "Chinese"], ["other", "not Chinese"]];
  const languageBox = select("Language", languages, () => show({ language: languageBox.value }));
  const search = el("input", { type: "search", class: "search", placeholder: "Search prompts and answers", "aria-label": "Search" });
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => show({ words: search.value.toLowerCase() }), 60);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    event.preventDefault();
    rows.querySelector(".row")?.focus();
  });
  const drawBox = el("button", { type: "button", class: "chip draw", "aria-pressed": "false", text: "draw formulas", onclick: () => {
    state.isDrawn = !state.isDrawn;
    drawBox.setAttribute("aria-pressed", String(state.isDrawn));
    open(state.current);
  } });
  const chips = el("div", { class: "chips", role: "group", "aria-label": "Filter" });
  const rows = el("div", { class: "rows" });
  const count = el("span");
  const back = el("button", { type: "button", text: "‹ back", onclick: () => show({ page: state.page - 1 }) });
  const next = el("button", { type: "button", text: "next ›", onclick: () => show({ page: state.page + 1 }) });
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  const panes = el("div", { class: "panes" }, el("div", { class: "list" }, rows, el("div", { class: "pager" }, back, count, next)), detail);
  place.append(
    el("div", { class: "controls" }, runBox, otherBox, groupBox, languageBox, search, Object.keys(data.formulas).length ? drawBox : null, chips),
    panes
  );
  if (data.left_out) place.append(el("ul", { class: "notes" }, el("li", { text: `${data.left_out.toLocaleString()} samples are not in this file` })));

  const answerText = (row) => row[ANSWERS].map(([prompt, answer]) => prompt + (answer.texts ?? []).map((t) => t[0]).join("\n")).join("\n");
  const searched = (row) => (row.text ??= `${row[ID]}\n${row[READ]}\n${row[GOLD]}\n${row.prompt}\n${answerText(row)}`.toLowerCase());
  const prepare = (from = 0) => {
    EVERY.rows.slice(from, from + PAGE).forEach(searched);
    if (from + PAGE < EVERY.rows.length) idle(() => prepare(from + PAGE));
  };
  const idle = (job) => (window.requestIdleCallback ?? setTimeout)(job);
  const matches = (row) => {
    if (state.group && row[GROUP] !== state.group) return false;
    if (state.language && isChinese(row) !== (state.language === "chinese")) return false;
    if (!FILTERS[state.filter][1](row)) return false;
    if (!state.words) return true;
    return searched(row).includes(state.words);
  };

  const mark = (score) => (score === null ? ["·", "weak"] : score >= 1 ? ["✓", "good"] : score <= 0 ? ["✗", "bad"] : ["◐", "weak"]);
  const summary = (row) => {
    const answer = row[ANSWERS].at(-1)?.[1] ?? {};
    if (answer.nll !== undefined) return `perplexity ${Math.exp(answer.nll / Math.max(1, answer.num_tokens)).toFixed(3)}`;
    const first = twin(row);
    const before = first && moved(row) !== 0 ? `${first[READ] ?? "no answer"} → ` : "";
    return `${before}${row[READ] ?? "no answer"}${row[GOLD] === null ? "" : ` · gold ${row[GOLD]}`}`;
  };

  const option = (value, text) => el("option", { value, text });
  const pick = (run, reference = byKey.get(run.reference), change = {}) => {
    Object.assign(state, { run, group: "", current: null });
    runBox.value = run.key;
    const others = data.runs.filter((other) => other !== run && other.task === run.task && (!other.is_baseline || other.key === run.reference));
    otherBox.replaceChildren(option("", "compare with …"), ...others.map((other) => option(other.key, `against ${name(other)}`)));
    otherBox.disabled = others.length === 0;
    const groups = [...new Set(run.rows.map((row) => row[GROUP]))].filter(Boolean).sort(collator.compare);
    groupBox.replaceChildren(option("", "every group"), ...groups.map((group) => option(group, group)));
    groupBox.hidden = groups.length < 2 || run === EVERY;
    const first = run.rows.length ? isChinese(run.rows[0]) : false;
    languageBox.hidden = run.rows.every((row) => isChinese(row) === first);
    languageBox.value = "";
    against(reference ?? null, { language: "", ...change });
  };
  const against = (reference, change = {}) => {
    const before = new Map(reference ? reference.rows.map((row) => [row[ID], row]) : []);
    Object.assign(state, { reference, before });
    otherBox.value = reference?.key ?? "";
    let filter = change.filter ?? (reference ? "flips" : state.filter);
    if (NEEDS_REFERENCE.has(filter) && (!reference || !state.run.rows.some(FILTERS[filter][1]))) filter = "all";
    show({ ...change, filter });
  };

  const show = (change) => {
    Object.assign(state, { page: 0 }, change);
    const found = state.run.rows.filter(matches);
    if (NEEDS_REFERENCE.has(state.filter)) found.sort((a, b) => moved(a) - moved(b)); // lost first
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    state.page = Math.min(Math.max(0, state.page), last);
    const start = state.page * PAGE;
    const shown = found.slice(start, start + PAGE);
    chips.replaceChildren(
      ...Object.entries(FILTERS).map(([key, [text, test]]) => {
        const num = key === "all" ? state.run.rows.length : state.run.rows.filter(test).length;
        const disabled = num === 0 && key !== state.filter ? "" : null;
        return el("button", { type: "button", class: "chip", "data-filter": key, "aria-pressed": String(key === state.filter), disabled, text: `${text} ${num.toLocaleString()}`, onclick: () => show({ filter: key }) });
      })
    );
    rows.replaceChildren(...shown.map(listRow));
    rows.scrollTop = 0;
    if (!shown.length) rows.append(nothing());
    count.textContent = found.length ? `${(start + 1).toLocaleString()}–${(start + shown.length).toLocaleString()} of ${found.length.toLocaleString()}` : "0";
    back.disabled = state.page === 0;
    next.disabled = state.page === last;
    open(shown.includes(state.current) ? state.current : shown[0] ?? null);
  };
  const nothing = () => {
    const elsewhere = state.words && state.run !== EVERY && asked.length > 1;
    const button = el("button", { type: "button", class: "chip", text: `search all ${asked.length} runs`, onclick: () => pick(EVERY, null, { filter: "all" }) });
    return el("div", { class: "empty" }, el("p", { text: "No sample is like this." }), elsewhere ? button : null);
  };
  const listRow = (row) => {
    const [sign, tone] = mark(row[SCORE]);
    const where = state.run === EVERY ? ` (${name(row.run)})` : "";
    const node = el("button", { type: "button", class: "row", onclick: () => read(row) },
      el("span", { class: tone, text: sign }), el("span", { class: "id", text: row[ID] + where }), el("span", { class: "what", text: summary(row) }));
    node.sample = row;
    return node;
  };

  const fact = (label, value, tone = "") => el("span", { class: `fact ${tone}` }, el("b", { text: label }), document.createTextNode(value ?? NONE));
  // A text as it was written, or with its formulas drawn: nodes of known elements with text, from data.formulas.
  const FORMULA = /\$\$[^$]{1,300}?\$\$|\$(?![\s$])[^$\n]{1,300}?(?<!\s)\$(?!\d)|\\\((?:[^\\]|\\[^()\[\]]){1,300}?\\\)|\\\[(?:[^\\]|\\[^()\[\]]){1,300}?\\\]/g;
  const MATHML = "http://www.w3.org/1998/Math/MathML";
  const drawn = ([tag, content]) => {
    const node = document.createElementNS(MATHML, tag);
    if (typeof content === "string") node.textContent = content;
    else node.append(...content.map(drawn));
    return node;
  };
  const formula = (latex) => {
    const node = drawn(["math", data.formulas[latex]]);
    node.setAttribute("title", latex);
    return node;
  };
  const written = (text, kind) => {
    const node = el("pre", { dir: "auto", class: kind });
    if (!state.isDrawn) node.textContent = text;
    let end = 0;
    for (const match of state.isDrawn ? text.matchAll(FORMULA) : []) {
      if (!Object.hasOwn(data.formulas, match[0])) continue;
      node.append(text.slice(end, match.index), formula(match[0]));
      end = match.index + match[0].length;
    }
    if (state.isDrawn) node.append(text.slice(end));
    return node;
  };
  const answerNode = (answer) => {
    if (answer.texts) {
      return el("div", {}, ...answer.texts.flatMap(([text, reason, num]) => [written(text || "(nothing)"), el("div", { class: "facts" }, fact("ended by", reason), fact("tokens", String(num)))]));
    }
    if (answer.choices) {
      const top = Math.max(...answer.choices.map((x) => x ?? -Infinity));
      const weights = answer.choices.map((x) => Math.exp((x ?? -Infinity) - top));
      const total = weights.reduce((a, b) => a + b, 0);
      return el("div", { class: "bars" }, ...weights.flatMap((w, i) => [
        el("span", { text: String.fromCharCode(65 + i) }), el("meter", { min: 0, max: 1, value: w / total }), el("span", { text: `${((100 * w) / total).toFixed(1)} %` })]));
    }
    return el("div", { class: "facts" }, fact("perplexity", Math.exp(answer.nll / Math.max(1, answer.num_tokens)).toFixed(4)), fact("tokens scored", answer.num_tokens.toLocaleString()), fact("most likely token", `${((100 * answer.num_greedy) / Math.max(1, answer.num_tokens)).toFixed(1)} %`));
  };
  const side = (row, run) => {
    const turns = row[ANSWERS].flatMap(([prompt, answer], turn) => [
      prompt ? el("h4", { text: `Turn ${turn + 1}: asked` }) : null, prompt ? written(prompt) : null,
      el("h4", { text: row[ANSWERS].length > 1 ? `Turn ${turn + 1}: answer` : "Answer" }), answerNode(answer)]);
    const facts = el("div", { class: "facts" }, fact("score", row[SCORE] === null ? NONE : String(row[SCORE]), mark(row[SCORE])[1]),
      fact("read", row[READ]), row[SCORE_UPSTREAM] === null ? null : fact("official extractor reads", row[READ_UPSTREAM]), ...row[FLAGS].map((flag) => fact("flag", flag, "bad")));
    const heading = state.reference ? `${run === state.reference ? "Reference" : "Candidate"}: ${name(run)}` : "";
    return el("div", {}, heading ? el("h4", { text: heading }) : null, facts, ...turns.filter(Boolean));
  };
  const open = (row) => {
    state.current = row;
    for (const node of rows.children) {
      if (!node.sample) continue;
      node.setAttribute("aria-current", String(node.sample === row));
      node.tabIndex = node.sample === row ? 0 : -1; // one stop of the tab key; the arrows move within
    }
    if (!row) return detail.replaceChildren();
    const first = twin(row);
    detail.replaceChildren(
      el("button", { type: "button", class: "back", text: "‹ all samples", onclick: () => toList() }),
      el("h3", {}, el("a", { href: link(row), title: "Link to this sample", text: row[ID] })),
      el("div", { class: "facts" }, row[GROUP] ? fact("group", row[GROUP]) : null, fact("gold", row[GOLD]), fact("prompt tokens", row[TOKENS].join(", "))),
      el("h4", { text: "Prompt" }), written(row.prompt, "prompt"),
      el("div", { class: "sides" }, first ? side(first, state.reference) : null, side(row, row.run))
    );
    detail.scrollTop = 0;
    const prompt = detail.querySelector(".prompt");
    prompt.scrollTop = prompt.scrollHeight; // the question stands behind the worked examples
    return undefined;
  };
  place.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const focused = document.activeElement;
    if (!step || !focused.classList.contains("row")) return;
    const to = step > 0 ? focused.nextElementSibling : focused.previousElementSibling;
    if (to?.sample) { event.preventDefault(); to.focus(); open(to.sample); }
  });
  // --- links: #RUN/SAMPLE, #RUN/SAMPLE?against=REFERENCE, #RUN/?show=lost ---
  const link = (row) => {
    const reference = state.reference ? `?against=${encodeURIComponent(state.reference.key)}` : "";
    return `#${encodeURIComponent(row.run.key)}/${encodeURIComponent(row[ID])}${reference}`;
  };
  const read = (row) => {
    panes.classList.add("reading"); // a phone shows the list or the sample
    open(row);
    history.replaceState(null, "", link(row));
    if (getComputedStyle(panes.querySelector(".list")).display === "none") panes.scrollIntoView({ behavior: "instant" });
  };
  const toList = () => {
    panes.classList.remove("reading");
    panes.querySelector('[aria-current="true"]')?.focus();
  };
  const decoded = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  const follow = () => {
    const [, key, id, query] = /^#([^/]+)\/([^?]*)\??(.*)$/.exec(location.hash) ?? [];
    const run = byKey.get(decoded(key ?? ""));
    if (!run) return reveal(named());
    const options = new URLSearchParams(query);
    const row = id ? run.rows.find((other) => other[ID] === decoded(id)) : null;
    const filter = Object.hasOwn(FILTERS, options.get("show")) ? options.get("show") : row ? "all" : undefined;
    pick(run, byKey.get(options.get("against")) ?? byKey.get(run.reference), { filter, words: (search.value = "") });
    if (row) {
      show({ page: Math.floor(run.rows.indexOf(row) / PAGE) });
      read(row);
    } else {
      panes.classList.remove("reading");
    }
    rows.querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
    return (id ? panes : place.parentElement).scrollIntoView({ behavior: "instant" });
  };
  addEventListener("hashchange", follow);
  pick(byKey.get(data.start) ?? asked[0]);
  if (location.hash) follow();
  root.dataset.ready = "true";
  idle(() => prepare()); // so that the first search is as fast as the others
})();
