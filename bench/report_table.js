// The tables, the filters and the page's own controls; report.js has the data and the charts.
const COLUMNS = [
  ["Op", (r) => r.op],
  ["Provider", (r) => r.provider],
  ["Direction", (r) => r.direction],
  ["Shape", (r) => r.bytes, (r) => r.size],
  ["Layer", (r) => r.layer],
  ["Type", (r) => r.dtype],
  ["Layout", (r) => r.layout],
  ["Fusion", (r) => r.fusion],
  ["Cache", (r) => (r.kind === "step" ? null : r.cache)],
  ["Launch", (r) => r.launch],
  ["Median, ms", (r) => r.ms_median, digits, "time"],
  ["p10", (r) => r.ms_p10, digits, "time"],
  ["p90", (r) => r.ms_p90, digits, "time"],
  ["GB/s", (r) => r.gb_per_s, digits, "time"],
  ["% of copy", (r) => r.pct_copy, (v) => digits(v, 3), "time"],
  ["Speed-up", (r) => r.speedup, times, "time"],
  ["Images/s", (r) => r.images_per_s, digits, "time"],
  ["Peak memory", (r) => r.peak_bytes, (v) => (v === null ? "" : bytes(v)), "time"],
  ["Error", (r) => r.max_err, tiny, "number"],
  ["Torch's error", (r) => r.ref_err, tiny, "number"],
  ["Nodes", (r) => r.nodes, digits, "number"],
  ["Kernels", (r) => (r.kernels ? r.kernels.length : null)],
].map(([title, value, show, kind]) => ({ title, value, show, kind }))
  // A column that no row of the file fills is left out.
  .filter(({ title, value }) => title === "Median, ms" || rows.some((row) => value(row) !== null));

const haystack = rows.map((row) => [row.op, row.provider, row.direction, row.size, row.layer,
  row.dtype, row.layout, row.fusion, row.cache, row.launch, row.error, ...(row.kernels || [])]
  .filter(Boolean).join(" ").toLowerCase());

function shown_cell(column, row) {
  if (column.title === "Kernels") {
    const cell = node("td");
    if (row.kernels) {
      cell.append(node("details", {}, node("summary", {}, `${row.kernels.length}`),
        row.kernels.join(", ")));
      cell.className = "wide";
    }
    return cell;
  }
  const value = column.value(row);
  const show = column.title === "Shape" ? () => row.size : column.show ?? ((said) => said ?? "");
  return node("td", { class: column.kind ? "num" : null }, String(show(value)));
}

function table_row(row) {
  const line_ = node("tr", { "data-row": row.index });
  const times_ = COLUMNS.filter((column) => column.kind === "time");
  for (const column of COLUMNS) {
    if (!row.timed && column.kind === "time") {
      if (column === times_[0]) {
        line_.append(node("td", { class: "bad wide", colspan: times_.length }, row.error));
      }
    } else if (column.title === "Op") {
      line_.append(node("th", { scope: "row" }, row.op));
    } else {
      line_.append(shown_cell(column, row));
    }
  }
  return line_;
}

function ordered(list) {
  if (state.sort === null) return list;
  const value = state.sort.value, sign = state.down ? -1 : 1;
  const number = state.sort.kind || state.sort.title === "Shape" || state.sort.title === "Kernels";
  // Rows without the value come last in either order.
  return [...list].sort((a, b) => {
    const [p, q] = [value(a), value(b)];
    if (p === null || q === null) return (p === null) - (q === null);
    return sign * (number ? Number(p) - Number(q) : String(p).localeCompare(String(q)));
  });
}

const headings = COLUMNS.map((column) => {
  const button = node("button", { type: "button" }, column.title);
  button.addEventListener("click", () => {
    state.down = state.sort === column && !state.down;
    state.sort = column;
    draw_table(rows.filter(passes));
  });
  return node("th", { scope: "col", class: column.kind ? "num" : null }, button);
});
const tbody = node("tbody");
byId("rows").querySelector(".scroll").append(node("table", {},
  node("thead", {}, node("tr", {}, ...headings)), tbody));

function draw_table(shown) {
  const list = ordered(shown.filter((row) =>
    state.words.every((word) => haystack[row.index].includes(word))));
  headings.forEach((heading, i) => {
    if (COLUMNS[i] !== state.sort) heading.removeAttribute("aria-sort");
    else heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
  });
  const some = list.slice(0, state.limit);
  tbody.replaceChildren(...some.map(table_row));
  byId("found").textContent = list.length === 0
    ? rows.length ? "No row under these filters fits the search." : "This file has no row."
    : `${list.length} of ${rows.length} rows` +
      (some.length < list.length ? `, the first ${some.length} listed` : "");
  const more = byId("more");
  more.replaceChildren();
  if (some.length < list.length) {
    const further = [[`${PAGE} more`, state.limit + PAGE], ["All of them", Infinity]];
    for (const [words, limit] of further) {
      const button = node("button", { type: "button" }, words);
      button.addEventListener("click", () => { state.limit = limit; draw_table(shown); });
      more.append(button, " ");
    }
  }
}

function draw_glance(shown) {
  const section = byId("glance");
  const body = section.querySelector(".body");
  const fits = (row) => !row.is_peer && (row.speedup !== null || !row.timed);
  const list = data.peer ? shown.filter(fits) : [];
  section.querySelector(".how").textContent = data.peer
    ? `Against ${data.peer.title} on the same case of the same run. Faster and slower are told ` +
      "only where the spreads from p10 to p90 do not overlap."
    : "No batch norm of cuDNN's or PyTorch's has a time in this file, so there is no peer.";
  if (!list.length) return empty(body, data.peer && rows.some(fits), "a peer's time beside it");
  const table = node("tbody");
  for (const some of grouped(list, (row) => `${row.op} ${row.provider}`).values()) {
    const known = some.filter((row) => row.speedup !== null)
      .sort((a, b) => a.speedup - b.speedup);
    const count = (verdict) => known.filter((row) => row.verdict === verdict).length;
    const edge = (row) => (row ? node("td", { class: "case" }, `${times(row.speedup)} ` +
      `${row.direction} ${row.layer || row.size} ${row.layer ? `@${row.batch} ` : ""}` +
      `${row.dtype} ${row.layout}${row.fusion === "none" ? "" : ` + ${row.fusion}`}`) : node("td"));
    const number = (value, name) => node("td", { class: `num ${value ? name : ""}` }, `${value}`);
    table.append(node("tr", {}, node("th", { scope: "row" }, some[0].op),
      node("td", {}, some[0].provider), number(known.length, ""), number(count("faster"), "faster"),
      number(count("even"), ""), number(count("slower"), "slower"),
      number(some.length - known.length, "slower"), edge(known[0]), edge(known.at(-1))));
  }
  body.className = "body";
  const titles = ["Op", "Provider", "Cases", "Faster", "Within spread", "Slower", "No time",
    "Worst", "Best"];
  body.append(node("div", { class: "scroll", role: "region", tabindex: 0,
    "aria-labelledby": "h-glance" }, node("table", {}, node("thead", {}, node("tr", {},
    ...titles.map((title, i) => node("th", { scope: "col",
      class: i > 1 && i < 7 ? "num" : null }, title)))), table)));
  return undefined;
}

function draw_all() {
  for (const body of document.querySelectorAll("section .body")) body.replaceChildren();
  const shown = rows.filter(passes);
  byId("shown").textContent = `${shown.length} of ${rows.length} rows shown`;
  draw_glance(shown);
  draw_roofline(shown);
  draw_ratios("layers", shown, (row) => row.layer !== null, (row) => row.layer, true);
  draw_ratios("others", shown, (row) => row.layer === null, (row) => row.size, false);
  draw_errors(shown);
  draw_steps(shown);
  draw_history();
  draw_table(shown);
}

/* ---- controls ---- */
for (const [name, title] of Object.entries(data.filters)) {
  const choices = data.choices[name];
  const select = node("select", { "data-filter": name });
  if (choices.length !== 1) select.append(node("option", { value: "" }, "all"));
  choices.forEach((value, i) => select.append(node("option", { value: i + 1 }, `${value}`)));
  select.disabled = choices.length < 2;
  if (name in data.first) {
    const first = select.options[choices.indexOf(data.first[name]) + 1];
    first.defaultSelected = true;
  }
  select.addEventListener("change", () => {
    if (select.value === "") delete state.filters[name];
    else state.filters[name] = choices[select.value - 1];
    state.limit = PAGE;
    draw_all();
  });
  byId("selects").append(node("label", {}, title, select));
}
for (const provider of data.providers) {
  const button = node("button", { type: "button", "aria-pressed": "true" },
    node("svg", { viewBox: "-1.4 -1.4 2.8 2.8", "aria-hidden": "true" },
      node("path", { class: "mark", d: provider.path, style: colour(provider.name) })),
    provider.name);
  button.addEventListener("click", () => {
    const hide = !state.hidden.has(provider.name);
    if (hide) state.hidden.add(provider.name); else state.hidden.delete(provider.name);
    button.setAttribute("aria-pressed", String(!hide));
    draw_all();
  });
  byId("legend").append(button);
}
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => {
  Object.assign(state, { filters: { ...data.first }, wide: {}, limit: PAGE });
  state.hidden.clear();
  for (const button of byId("legend").children) button.setAttribute("aria-pressed", "true");
  setTimeout(draw_all);
});
byId("search").addEventListener("input", (event) => {
  state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  state.limit = PAGE;
  draw_table(rows.filter(passes));
});
for (const kind of ["pointerover", "click"]) {
  document.querySelector("main").addEventListener(kind, (event) => {
    const readout = event.target.closest("section")?.querySelector(".readout");
    const said = event.target.closest?.(".mark, .hit")?.querySelector("title");
    if (readout && said) readout.textContent = said.textContent;
  });
}
const theme = byId("theme");
const prefers = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme ?? (prefers.matches ? "dark" : "light"))
  === "dark";
const name_theme = () => {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`);
};
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  name_theme();
});
prefers.addEventListener("change", name_theme);

const refused = rows.filter((row) => !row.timed && row.error.startsWith("refused")).length;
const failed = rows.filter((row) => !row.timed).length - refused;
byId("counts").textContent = `${rows.length} rows: ${rows.length - refused - failed} timed, ` +
  `${refused} refused a time by the error gate, ${failed} without a time for another reason.`;
const over = data.peer ? `Speed-up over ${data.peer.title}` : "Speed-up";
byId("h-layers").textContent = `${over}, layer by layer of ResNet-50`;
byId("h-others").textContent = `${over}, other shapes`;
for (const each of document.querySelectorAll(".gate")) each.textContent = `${data.gate}×`;
name_theme();
draw_all();
// Charts are drawn in pixels, so that their letters keep their size; a new width draws them anew.
let width = document.body.clientWidth, waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw_all(); }
  }, 120);
});
