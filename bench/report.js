// Filters the rows that lie in the page and draws them; what belongs beside what came with them.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows.map((list, index) => {
  const row = { index };
  data.columns.forEach((name, i) => { row[name] = list[i]; });
  row.kernels = row.kernels === null ? null : data.kernels[row.kernels];
  row.batch = row.shape[0] ?? null;
  row.size = row.shape.join("x");
  row.timed = row.ms_median !== null;
  return row;
});
const providers = new Map(data.providers.map((p) => [p.name, p]));
const state = { filters: { ...data.first }, hidden: new Set(), wide: {}, words: [], sort: null,
  down: false, limit: 200 };
const PAGE = 200, FACETS = 4;
const byId = (id) => document.getElementById(id);

function node(name, attributes = {}, ...children) {
  const svg = node.svg.has(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
node.svg = new Set(["svg", "g", "path", "line", "rect", "text", "title", "desc", "polyline"]);

// Numbers as people read them: four digits, no trailing zeros, an exponent only when it must be.
function digits(value, count = 4) {
  if (value === null) return "";
  const number = Number(value);
  if (!Number.isFinite(number)) return Number.isNaN(number) ? "NaN" : number > 0 ? "∞" : "-∞";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(count - 1);
  return String(Number(number.toPrecision(count)));
}
// Not Math.min(...list): a large file has more rows than a call takes arguments.
const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity);
const most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);
const tiny = (value) => (value === null ? "" : Number(value) === 0 ? "0"
  : Number.isFinite(Number(value)) ? Number(value).toExponential(1) : digits(value));
const times = (value) => (value === null ? "" : `${Number(value).toFixed(2)}×`);
function bytes(value) {
  const step = value >= 1e9 ? 3 : value >= 1e6 ? 2 : value >= 1e3 ? 1 : 0;
  return `${digits(value / 1000 ** step, 3)} ${["B", "kB", "MB", "GB"][step]}`;
}

function describe(row) {
  const words = [`${row.provider}, ${row.op}: ${row.direction} (${row.size}) ${row.dtype} ` +
    `${row.layout}`];
  if (row.fusion !== "none") words.push(`+ ${row.fusion}`);
  if (row.kind === "kernel") words.push(...[row.cache, row.launch].filter(Boolean));
  if (!row.timed) return `${words.join(", ")}: ${row.error}`;
  const said = [`${digits(row.ms_median)} ms (${digits(row.ms_p10)} to ${digits(row.ms_p90)})`];
  if (row.gb_per_s !== null) {
    said.push(`${digits(row.gb_per_s)} GB/s, ${digits(row.pct_copy, 3)} % of copy`);
  }
  if (row.images_per_s !== null) said.push(`${digits(row.images_per_s)} images/s`);
  if (row.speedup !== null && !row.is_peer) said.push(`${times(row.speedup)} ${data.peer.title}`);
  if (row.max_err !== null) said.push(`error ${tiny(row.max_err)}, torch's ${tiny(row.ref_err)}`);
  return `${words.join(", ")}: ${said.join("; ")}`;
}

// A step has no cache state and no fusion of its own, so those filters pass it by, as every filter
// does a row that stands for all cases.
const not_of_steps = new Set(data.not_of_steps);
const passes = (row) => !state.hidden.has(row.provider) &&
  Object.entries(state.filters).every(([name, value]) => row[name] === value ||
    row[name] === null || (row.kind === "step" && not_of_steps.has(name)));

function grouped(list, key) {
  const groups = new Map();
  for (const item of list) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

/* ---- drawing ---- */
const colour = (name) => `--c: var(--${providers.get(name).colour})`;

function mark(parent, x, y, row, radius, label = describe(row)) {
  const extra = (row.layout === "nhwc" ? " hollow" : "") +
    (row.error && row.error.startsWith("refused") ? " refused" : "");
  parent.append(node("path", { class: `mark${extra}`, d: providers.get(row.provider).path,
    transform: `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${radius})`,
    style: colour(row.provider), "data-row": row.index }, node("title", {}, label)));
}
const text = (parent, x, y, words, attributes = {}) =>
  parent.append(node("text", { x: x.toFixed(1), y: y.toFixed(1), ...attributes }, words));
const line = (parent, x1, y1, x2, y2, name) =>
  parent.append(node("line", { x1, y1, x2, y2, class: name }));

let serial = 0;
function chart(figure, height, title, summary) {
  const width = Math.max(260, Math.floor(figure.clientWidth || 320));
  serial += 1;
  const names = [`t${serial}`, `d${serial}`];
  const drawn = node("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-labelledby": names.join(" ") },
  node("title", { id: names[0] }, title), node("desc", { id: names[1] }, summary));
  figure.append(drawn);
  return [drawn, width];
}

function scale(low, high, from, to) {
  const [a, b] = [Math.log(low), Math.log(high)];
  return (value) => from + (Math.log(value) - a) / (b - a || 1) * (to - from);
}

function ticks(low, high, room) {
  const decades = Math.log10(high / low);
  const steps = decades < room / 110 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / (room / 55)));
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    for (const step of steps) {
      const value = Number(`${step}e${e}`);
      if (value >= low && value <= high && e % every === 0) found.push(value);
    }
  }
  return found;
}

function scatter(figure, list, options) {
  const height = options.height || 330;
  const [drawn, width] = chart(figure, height, options.title, options.summary);
  const [left, right, top, bottom] = [58, width - 14, 18, height - 42];
  const reach = (values, more) => {
    const good = [...values, ...more].filter((v) => v > 0 && Number.isFinite(v));
    if (!good.length) return [0.1, 10];
    // A decade at least: one size alone would leave the axis with one number.
    const [low, high] = [least(good), most(good)];
    const margin = Math.max(1.6, Math.sqrt(10 * low / high));
    return [low / margin, high * margin];
  };
  const xs = list.map(options.x), ys = list.map(options.y);
  let [xl, xh] = reach(xs, []), [yl, yh] = reach(ys, options.lines || []);
  if (options.domain) [xl, xh, yl, yh] = [...options.domain, ...options.domain];
  const x = scale(xl, xh, left, right), y = scale(yl, yh, bottom, top);
  for (const value of ticks(xl, xh, right - left)) {
    line(drawn, x(value), top, x(value), bottom, "grid");
    text(drawn, x(value), bottom + 16, options.xtick(value), { class: "tick",
      "text-anchor": "middle" });
  }
  for (const value of ticks(yl, yh, bottom - top)) {
    line(drawn, left, y(value), right, y(value), "grid");
    text(drawn, left - 6, y(value) + 4, options.ytick(value), { class: "tick",
      "text-anchor": "end" });
  }
  line(drawn, left, bottom, right, bottom, "axis");
  text(drawn, (left + right) / 2, height - 6, options.xlabel, { class: "note",
    "text-anchor": "middle" });
  text(drawn, left - 50, 10, options.ylabel, { class: "note" });
  options.behind?.(drawn, x, y, { left, right, top, bottom, xl, xh });
  // What has no place on a logarithmic axis lies on its edge: zero below, infinity above.
  const placed = (value, low, high) => (value > low ? Math.min(value, high) : low);
  list.forEach((row, i) => mark(drawn, x(placed(xs[i], xl, xh)),
    y(placed(Number.isNaN(ys[i]) ? yh : ys[i], yl, yh)), row, 4.5));
}

function facets(body, name, groups, draw) {
  const all = [...groups];
  const some = state.wide[name] ? all : all.slice(0, FACETS);
  body.className = `body grid${some.length < 2 ? " few" : ""}`;
  const figures = some.map(([title, list]) => {
    const figure = node("figure", {}, node("h3", {}, title));
    body.append(figure);
    return [figure, title, list];
  });
  for (const each of figures) draw(...each);
  if (some.length < all.length) {
    const button = node("button", { type: "button", class: "wider" },
      `Draw the other ${all.length - some.length} charts`);
    button.addEventListener("click", () => { state.wide[name] = true; draw_all(); });
    body.append(node("p", {}, button));
  }
}

function empty(body, present, what) {
  body.className = "body";
  body.append(node("p", { class: "empty" }, present
    ? `No row under these filters has ${what}.` : `No row of this file has ${what}.`));
}

// Bars from 1x, one for each row; a row without a time says so in its bar's place. All charts of a
// section have one scale, so that bars of two of them can be compared.
function ratio_bars(figure, title, list, label, reach) {
  const lanes = grouped(list, label);
  const each = 13, gap = 9, top = 20;
  const height = top + [...lanes.values()].reduce((sum, l) => sum + l.length * each + gap, 0) + 6;
  const known = list.filter((row) => row.speedup !== null).map((row) => row.speedup);
  const wins = known.filter((value) => value > 1).length;
  const [drawn, width] = chart(figure, height, title, known.length
    ? `${known.length} speed-ups from ${times(least(known))} to ` +
      `${times(most(known))}, ${wins} of them above 1×.` : "No row here has a time.");
  const left = 12 + 7.5 * most(list.map((row) => label(row).length));
  const right = width - 4;
  const [low, high] = reach;
  // Room for a value behind the longest bar of either side.
  const room = Math.log(high / low) * 56 / Math.max(60, right - left - 112);
  const x = scale(low * Math.exp(-room), high * Math.exp(room), left, right);
  for (let e = -6; e <= 7; e += 1) {
    const at = x(2 ** e);
    if (at < left + 8 || at > right - 8) continue;
    line(drawn, at, top - 4, at, height, e === 0 ? "axis" : "grid");
    text(drawn, at, 11, `${2 ** e}×`, { class: "tick", "text-anchor": "middle" });
  }
  let y = top + gap / 2;
  for (const [name, members] of lanes) {
    text(drawn, left - 8, y + members.length * each / 2 + 4, name, { "text-anchor": "end" });
    for (const row of members) {
      const middle = y + each / 2;
      const group = node("g", { class: "row" });
      drawn.append(group);
      if (row.speedup === null) {
        const fits = Math.floor((right - x(1)) / 6.2);
        const said = `${row.provider}: ${row.error}`;
        const short = said.length > fits ? `${said.slice(0, fits - 1)}…` : said;
        text(group, x(1) + 6, middle + 4, short, { class: "bad", "data-row": row.index });
      } else {
        const at = x(row.speedup), from = Math.min(at, x(1));
        group.append(node("rect", { class: "bar", x: from, y: middle - 4, height: 8,
          width: Math.max(0.5, Math.abs(at - x(1))), style: colour(row.provider) }));
        mark(group, at, middle, row, 3.6);
        const beyond = row.speedup >= 1;
        text(group, at + (beyond ? 8 : -8), middle + 4, times(row.speedup),
          { class: "note", "text-anchor": beyond ? "start" : "end" });
      }
      group.append(node("rect", { class: "hit", x: left, y, width: right - left, height: each,
        "data-row": row.index }, node("title", {}, describe(row))));
      y += each;
    }
    y += gap;
  }
}

function draw_ratios(id, shown, belongs, label, batch) {
  const peer = data.peer;
  const of = (list) => list.filter((row) => row.kind === "kernel" && belongs(row) &&
    row.bytes !== null && !row.is_peer && (row.speedup !== null || !row.timed));
  const list = peer ? of(shown) : [];
  const body = byId(id).querySelector(".body");
  byId(id).querySelector(".readout").hidden = !list.length;
  if (!list.length) return empty(body, peer && of(rows).length, batch
    ? "a ResNet-50 layer with a time of its peer beside it" : "another shape beside its peer");
  const key = (row) => [row.op, row.direction, row.dtype, row.layout.toUpperCase(),
    row.fusion === "none" ? "" : `+ ${row.fusion}`, row.cache, row.launch,
    batch ? `batch ${row.batch}` : ""].filter(Boolean).join(" · ");
  const known = list.filter((row) => row.speedup !== null).map((row) => row.speedup);
  const reach = [Math.min(0.9, least(known)), Math.max(1.11, most(known))];
  facets(body, id, grouped(list, key), (figure, title, members) =>
    ratio_bars(figure, title, members, label, reach));
  const alone = shown.filter((row) => row.kind === "kernel" && belongs(row) && row.timed &&
    row.speedup === null).length;
  if (alone) {
    body.append(node("p", { class: "how" }, `Not drawn: ${alone} rows that have a time ` +
      "but none of the peer's beside it."));
  }
  return undefined;
}

function draw_roofline(shown) {
  const fits = (row) => row.kind === "kernel" && row.timed && row.gb_per_s !== null;
  const list = shown.filter(fits);
  const body = byId("roofline").querySelector(".body");
  byId("roofline").querySelector(".readout").hidden = !list.length;
  if (!list.length) return empty(body, rows.some(fits), "a time");
  return facets(body, "roofline", grouped(list, (row) => row.direction), (figure, title, some) => {
    const speeds = some.map((row) => row.gb_per_s);
    scatter(figure, some, { title: `${title}: GB/s against bytes of the tensor`,
      summary: `${some.length} rows from ${digits(least(speeds), 3)} to ` +
        `${digits(most(speeds), 3)} GB/s; copy at ${data.roofs.join(", ")} GB/s.`,
      x: (row) => row.bytes, y: (row) => row.gb_per_s, lines: data.roofs, xtick: bytes,
      ytick: (value) => digits(value), xlabel: "bytes of the tensor", ylabel: "GB/s",
      behind: (drawn, x, y, box) => data.roofs.forEach((roof) => {
        line(drawn, box.left, y(roof), box.right, y(roof), "roof");
        text(drawn, box.left + 4, y(roof) - 5, `copy ${digits(roof)} GB/s`);
      }) });
  });
}

function draw_errors(shown) {
  const fits = (row) => row.max_err !== null && row.ref_err !== null;
  const list = shown.filter(fits);
  const body = byId("errors").querySelector(".body");
  byId("errors").querySelector(".readout").hidden = !list.length;
  if (!list.length) return empty(body, rows.some(fits), "an error against float64");
  body.className = "body grid many";
  const good = list.flatMap((row) => [Number(row.max_err), Number(row.ref_err)])
    .filter((value) => value > 0 && Number.isFinite(value));
  const domain = good.length ? [least(good) / 4, most(good) * 4] : [1e-8, 1];
  const figures = [...grouped(list, (row) => row.provider)].map(([name, some]) => {
    const figure = node("figure", {}, node("h3", {}, name));
    body.append(figure);
    return [figure, name, some];
  });
  for (const [figure, name, some] of figures) {
    const closer = some.filter((row) => Number(row.max_err) <= Number(row.ref_err)).length;
    scatter(figure, some, { title: `${name}: error of each row against torch's own error`,
      summary: `${some.length} rows, ${closer} of them no further from float64 than torch.`,
      x: (row) => Number(row.ref_err), y: (row) => Number(row.max_err), domain, height: 300,
      xtick: tiny, ytick: tiny, xlabel: "torch's own error", ylabel: "error of the row",
      behind: (drawn, x, y, box) => {
        line(drawn, x(box.xl), y(box.xl), x(box.xh), y(box.xh), "axis");
        const edge = box.xh / data.gate;
        line(drawn, x(box.xl), y(box.xl * data.gate), x(edge), y(box.xh), "roof");
        text(drawn, x(edge) - 8, box.top + 12, `${data.gate}×`, { "text-anchor": "end" });
      } });
  }
  return undefined;
}

function draw_steps(shown) {
  const fits = (row) => row.kind === "step";
  const list = shown.filter(fits);
  const body = byId("steps").querySelector(".body");
  byId("steps").querySelector(".readout").hidden = !list.length;
  if (!list.length) return empty(body, rows.some(fits), "a whole network's step");
  const key = (row) => `${row.direction} · ${row.dtype} · ${row.layout.toUpperCase()}`;
  return facets(body, "steps", grouped(list, key), (figure, title, members) => {
    const lanes = grouped(members, (row) => `batch ${row.batch}, ${row.size}`);
    const each = 32, head = 26;
    const known = members.filter((row) => row.images_per_s !== null);
    const best = Math.max(1e-9, most(known.map((row) => row.images_per_s)));
    const [drawn, width] = chart(figure, members.length * each + lanes.size * head, title,
      `${known.length} of ${members.length} rows have a time, the fastest ` +
      `${digits(best)} images a second.`);
    const reach = (value) => value / best * (width - 130);
    let y = 0;
    for (const [name, some] of lanes) {
      text(drawn, 0, y + 18, name, { class: "note" });
      y += head;
      for (const row of some) {
        const group = node("g", { class: "row" });
        drawn.append(group);
        const said = `${row.op.replace(/^resnet50\[(.*)\]$/, "$1")} · ${row.provider}` +
          `${row.launch === "graph" ? " · graph" : ""}`;
        text(group, 0, y + 11, said);
        if (row.images_per_s === null) {
          text(group, 0, y + 26, row.error || "no time", { class: "bad", "data-row": row.index });
        } else {
          const end = reach(row.images_per_s);
          group.append(node("rect", { class: "bar", x: 0, y: y + 16, height: 10, width: end,
            style: colour(row.provider) }));
          mark(group, Math.max(5, end), y + 21, row, 4.5);
          text(group, Math.max(5, end) + 10, y + 25, `${digits(row.images_per_s)}/s` +
            `${row.peak_bytes === null ? "" : `, ${bytes(row.peak_bytes)}`}`, { class: "note" });
        }
        group.append(node("rect", { class: "hit", x: 0, y, width, height: each,
          "data-row": row.index }, node("title", {}, describe(row))));
        y += each;
      }
    }
  });
}

function draw_history() {
  const section = byId("history");
  section.hidden = !data.history.length;
  if (!data.history.length) return undefined;
  const points = data.history.flatMap((run, at) => run.points.filter(passes).map((p) => ({ ...p,
    at, run })));
  const body = section.querySelector(".body");
  section.querySelector(".readout").hidden = !points.length;
  if (!points.length) return empty(body, true, "a speed-up in any run");
  body.className = "body grid few";
  const figure = node("figure");
  body.append(figure);
  const height = 320;
  const [drawn, width] = chart(figure, height, "Speed-ups from run to run",
    `${points.length} speed-ups in ${data.history.length} runs.`);
  const values = points.map((p) => p.speedup);
  const low = Math.min(0.8, least(values)) / 1.1, high = Math.max(1.25, most(values)) * 1.1;
  const y = scale(low, high, height - 48, 12), left = 48;
  const x = (at) => left + 24 + at * (width - left - 60) / Math.max(1, data.history.length - 1);
  for (let e = -6; e <= 7; e += 1) {
    if (2 ** e < low || 2 ** e > high) continue;
    line(drawn, left, y(2 ** e), width, y(2 ** e), e === 0 ? "axis" : "grid");
    text(drawn, left - 6, y(2 ** e) + 4, `${2 ** e}×`, { class: "tick", "text-anchor": "end" });
  }
  data.history.forEach((run, at) => {
    if (at !== 0 && at !== data.history.length - 1) return;
    const anchor = { class: "tick", "text-anchor": at === 0 ? "start" : "end" };
    const place = at === 0 ? left : width;
    text(drawn, place, height - 24, run.started, anchor);
    text(drawn, place, height - 9, run.commit, anchor);
  });
  for (const [, some] of grouped(points, (p) => `${p.case} ${p.provider}`)) {
    drawn.append(node("polyline", { points: some.map((p) => `${x(p.at)},${y(p.speedup)}`).join(" "),
      style: `${colour(some[0].provider)}; stroke: var(--c); fill: none; stroke-opacity: .5` }));
  }
  for (const p of points) {
    const said = `${p.provider}, ${p.case.replaceAll("|", " ")}: ${times(p.speedup)}, ` +
      `${p.run.commit}, ${p.run.started}`;
    mark(drawn, x(p.at), y(p.speedup), { ...p, index: "", error: null }, 4, said);
  }
  return undefined;
}
