"use strict";
// All text reaches the document as text nodes and attributes, never as markup, because names come from untrusted files.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}
const fill = (element, ...children) => element.replaceChildren(...h("p", null, ...children).childNodes);
// An untrusted name must not change the direction of neighboring text.
const named = (text) => h("bdi", null, text);

const number = (value, digits) => (value == null ? "" : value.toFixed(digits));
const short = (value) =>
  value == null ? "" : value >= 100 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

// Models and results

const label = (model) => (model.run ? `${model.name} (${model.run})` : model.name);
const key = (model) =>
  [label(model), model.img_size && `${model.img_size} px`, model.settings].filter(Boolean).join(", ");
for (const model of data.models) {
  model.label = label(model);
  model.key = key(model);
  model.text = [model.label, model.family, model.origin, model.license, model.norm].join(" ").toLowerCase();
  model.ms = model.infer_samples_per_sec && 1000 / model.infer_samples_per_sec;
  for (const card of Object.keys(data.speed)) model[`${card}_ms`] = model[`${card}_bn`] && 1000 / model[`${card}_bn`];
}
for (const set of data.sets) {
  set.rows = set.rows.map((values) => {
    const row = Object.create(data.models[values[0]]);
    set.columns.forEach((name, place) => place && (row[name] = values[place]));
    row.set = set;
    const source = data.sources[row.source];
    data.models[values[0]].seed = source.seeds?.split(" ")[0] ?? "0";
    return Object.assign(row, { source });
  });
}
const results = (model) =>
  data.sets.map((set) => [set, set.rows.find((row) => row.key === model.key)]).filter(([, row]) => row);

// State, kept in the URL so that views can be linked

const DEFAULTS = {
  set: data.sets[0]?.name ?? "", q: "", family: "", origin: "", license: "", params: "", gmacs: "", pixels: "",
  sort: "rank", x: "gmacs", y: "top1", pareto: "1", log: "1", model: "", compare: "",
};
let state = {};
function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (given.has(name)) state[name] = given.get(name);
  if (!data.sets.some((set) => set.name === state.set)) state.set = DEFAULTS.set;
}
const link = (changes) => `#${new URLSearchParams(changes)}`;
// Only the list's URL has filters; a model's page and a comparison link back to it.
let listAddress = "#";
function update(changes) {
  history.replaceState(null, "", link(Object.entries({ ...state, ...changes }).filter(([name, value]) => value !== DEFAULTS[name])));
  read();
  showList();
}

// Columns of the table

const COLUMNS = [
  { name: "rank", title: "#", help: "Rank among all models on this test set", first: 1, text: (row) => row.rank ?? "–" },
  { name: "label", title: "Model", help: "Name for timm.create_model, or run", first: 1, left: true, cell: modelCell },
  { name: "top1", title: "Top-1", help: "Accuracy in percent; bars compare the models shown", first: -1, cell: accuracyCell },
  { name: "top5", optional: true, title: "Top-5", help: "Correct class among the five most probable, in percent", first: -1, text: (row) => number(row.top5, 2) },
  { name: "interval", optional: true, title: "95 % interval", help: "Wilson interval of top-1; over several seeds, ± their standard deviation", by: "top1_low", first: -1, text: spread, off: true },
  { name: "top1_diff", optional: true, title: "Δ BN", help: "Top-1 minus that of the BatchNorm sibling; = means the same function", first: -1, cell: differenceCell },
  { name: "params", title: "Params, M", help: "Parameters in millions", first: 1, text: (row) => short(row.params) },
  { name: "gmacs", optional: true, title: "GMACs", help: "Billions of multiply-adds per image, those of UBN's convolutions included", first: 1, text: (row) => short(row.gmacs) },
  { name: "macts", optional: true, title: "M acts", help: "Millions of outputs of convolutions and matrix products", first: 1, text: (row) => short(row.macts), off: true },
  { name: "img_size", title: "Pixels", help: "Image side", first: 1, text: (row) => row.img_size ?? "" },
  { name: "ms", optional: true, title: "ms/image", help: "Inference time of the UBN model, measured by this project; see the model's page for the machine", first: 1, text: (row) => short(row.ms), off: true },
  ...Object.entries(data.speed).map(([card, title], place) => ({
    name: `${card}_bn`, optional: true, title: `BN images/s, ${title.split(",")[0]}`, help: `BatchNorm sibling, measured by timm: ${title}`, first: -1,
    text: (row) => short(row[`${card}_bn`]), off: place > 0,
  })),
  { name: "license", optional: true, title: "License", help: "License of the weights", first: 1, left: true, cell: (row) => named(row.license ?? "") },
  { name: "measured", title: "Measured", help: "Who measured it", by: "measured", first: 1, left: true, cell: (row) => named(`${row.source.measured}, ${row.source.date ?? row.source.table}`), off: true },
  { name: "compare", title: "Compare", help: "Choose two models", cell: compareCell, unsorted: true },
];
// Columns without a value in this test set are omitted.
const columnsOf = (set) => COLUMNS.filter((column) => shown.has(column.name) &&
  (!column.optional || set.rows.some((row) => (row[column.by ?? column.name] ?? null) !== null)));
const shown = new Set(COLUMNS.filter((column) => !column.off).map((column) => column.name));

function modelCell(row) {
  const badge = row.origin === "converted" ? null : h("span", { class: `badge ${row.origin}` }, row.origin);
  const below = [row.family, row.settings, row.rank == null && `${row.images.toLocaleString("en")} images only`];
  const [architecture, ...tag] = row.name.split(/(?=\.)/);
  return h("span", { class: "model" },
    h("a", { href: link({ model: row.label }) }, named(architecture), h("wbr"), tag.length ? h("small", null, named(tag.join(""))) : null), badge,
    h("small", null, row.run && named(row.run), row.run && " · ", named(below.filter(Boolean).join(" · "))));
}
function accuracyCell(row) {
  return h("span", { class: "accuracy", title: spread(row) }, number(row.top1, 2));
}
function differenceCell(row) {
  if (row.top1_diff == null) return "";
  if (row.origin === "converted" && row.top1_diff === 0) return h("span", { title: "the same function", class: "quiet" }, "=");
  return h("span", { class: row.top1_diff < 0 ? "worse" : "better" }, signed(row.top1_diff));
}
function spread(row) {
  if (row.top1_std != null) return `± ${number(row.top1_std, 2)} over ${row.source.seeds.split(" ").length} seeds`;
  return row.top1_low == null ? "" : `${number(row.top1_low, 2)} to ${number(row.top1_high, 2)}`;
}
function compareCell(row) {
  return h("input", {
    type: "checkbox", "aria-label": `Compare ${row.key}`, "data-key": row.key, checked: chosen.includes(row.key),
    onchange: (event) => choose(row.key, event.target.checked),
  });
}

// The list: filters, chart, table

let frontOpen = false;
let chartOf = "";
let scale = [0, 100];
let visible = [];
let painted = 0;
let shownVersion = 0;

const current = () => data.sets.find((each) => each.name === state.set);
function filtered() {
  const set = current();
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const most = ["params", "gmacs", "pixels"].map((name) => [name === "pixels" ? "img_size" : name, parseFloat(state[name])]);
  return (set?.rows ?? []).filter((row) =>
    words.every((word) => row.text.includes(word)) &&
    ["family", "origin", "license"].every((name) => !state[name] || (row[name] ?? "not stated") === state[name]) &&
    most.every(([name, limit]) => Number.isNaN(limit) || (row[name] != null && row[name] <= limit)));
}
function sorted(rows) {
  const down = state.sort.startsWith("-");
  const column = COLUMNS.find((each) => each.name === state.sort.replace("-", "")) ?? COLUMNS[0];
  const value = (row) => (column.name === "measured" ? row.source.measured : row[column.by ?? column.name]);
  const missing = (it) => it == null || it === "";
  return rows.map((row, place) => [value(row), place, row]).sort(([a, i], [b, j]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return (down ? -order : order) || i - j;
  }).map(([, , row]) => row);
}

function options(select, values, all) {
  select.replaceChildren(...(all ? [h("option", { value: "" }, all)] : []), ...values.map(([value, text]) => h("option", { value }, text)));
}
function counted(rows, name) {
  const counts = new Map();
  for (const row of rows) counts.set(row[name] ?? "not stated", (counts.get(row[name] ?? "not stated") ?? 0) + 1);
  return [...counts].sort(([a], [b]) => a.localeCompare(b)).map(([value, count]) => [value, `${value} (${count})`]);
}

let optionsOf;
function showList() {
  const set = current();
  if (!set) return;
  listAddress = location.hash || "#";
  const form = $("#filters");
  if (optionsOf !== set) {
    optionsOf = set;
    options(form.elements.family, counted(set.rows, "family"), "all");
    options(form.elements.license, counted(set.rows, "license"), "all");
  }
  for (const control of [...form.elements, ...$("#chart").querySelectorAll("select, input")]) {
    if (!control.name) continue;
    if (control.type === "checkbox") control.checked = state[control.name] === "1";
    else if (control.value !== state[control.name]) control.value = state[control.name];
  }
  visible = sorted(filtered());
  const accuracies = visible.map((row) => row.top1);
  const [low, high] = [Math.min(...accuracies), Math.max(...accuracies)];
  scale = [low - (high - low) / 10, high];
  const inherited = set.rows.filter((row) => row.source.measured.startsWith("inherited")).length;
  $("#about").textContent =
    (set.images ? `${set.images.toLocaleString("en")} images. ` : "") +
    (inherited ? `${inherited} rows are inherited: converted weights compute the function of their BatchNorm sibling, which timm measured (${data.date}). ` : "") +
    (set.rows.length - inherited ? `${set.rows.length - inherited} rows were measured by this project or given to it.` : "");
  $("#count").textContent = `${visible.length} of ${set.rows.length} models`;
  $("#caption").textContent = `${set.title}, ${state.sort === "rank" ? "best first" : `sorted by ${state.sort.replace("-", "")}`}`;
  showHead();
  showBody();
  showChart();
}
function showHead() {
  const columns = columnsOf(current());
  const row = $("#table thead tr");
  const focused = document.activeElement?.dataset?.sort;
  row.replaceChildren(...columns.map((column) => {
    const down = state.sort === `-${column.name}`;
    const active = down || state.sort === column.name;
    const next = active ? (down ? column.name : `-${column.name}`) : (column.first < 0 ? "-" : "") + column.name;
    return h("th", { scope: "col", class: `${column.name} ${column.left ? "left" : ""}`, title: column.help,
      "aria-sort": column.unsorted ? null : active ? (down ? "descending" : "ascending") : "none" },
      column.unsorted ? column.title : h("button", { type: "button", "data-sort": column.name, onclick: () => update({ sort: next }) },
        column.title, h("span", { "aria-hidden": "true" }, active ? (down ? " ▼" : " ▲") : "")));
  }));
  if (focused) $(`[data-sort="${focused}"]`)?.focus();
}
function line(row) {
  if (row.lineOf !== shownVersion) {
    row.lineOf = shownVersion;
    row.line = h("tr", null, ...columnsOf(row.set).map((column) =>
      h(column.name === "label" ? "th" : "td", { class: `${column.name} ${column.left ? "left" : ""}`, scope: column.name === "label" ? "row" : null },
        column.cell ? column.cell(row) : String(column.text(row)))));
    row.bar = $(".accuracy", row.line);
  }
  row.bar?.style.setProperty("--share", Math.min(1, (row.top1 - scale[0]) / (scale[1] - scale[0] || 1)));
  return row.line;
}
// Render the first screen immediately and the rest right after.
let pending;
function showBody() {
  clearTimeout(pending);
  const body = $("#table tbody");
  body.replaceChildren(...visible.slice(0, 50).map(line));
  painted = Math.min(50, visible.length);
  if (!visible.length) body.append(h("tr", null, h("td", { colspan: shown.size, class: "left" }, "No model matches the filters. Reset to show all.")));
  if (painted < visible.length) pending = setTimeout(paintAll, 50);
}
function paintAll() {
  clearTimeout(pending);
  $("#table tbody").append(...visible.slice(painted).map(line));
  painted = visible.length;
}
addEventListener("beforeprint", paintAll);

const AXES = {
  gmacs: "GMACs per image", params: "parameters (M)", macts: "activations (M)", ms: "ms per image, UBN, measured by this project",
  ...Object.fromEntries(Object.entries(data.speed).map(([card, title]) => [`${card}_ms`, `ms per image, BatchNorm sibling, ${title.split(",")[0]} (timm)`])),
};
function paretoFront(rows, x, y) {
  const front = [];
  for (const row of [...rows].sort((a, b) => a[x] - b[x] || b[y] - a[y]))
    if (!front.length || row[y] > front.at(-1)[y]) front.push(row);
  return front;
}
const brief = (row) => row.name.replace(/_ubn(\.bn_.*)?$/, "");
function showChart() {
  const place = $("#plot");
  if (!$("#chart").open || !place.clientWidth) return;
  const { x, y } = state;
  const drawn = JSON.stringify([{ ...state, sort: "" }, place.clientWidth]);
  if (drawn === chartOf) return;
  chartOf = drawn;
  const rows = visible.filter((row) => row[x] != null && row[y] != null);
  const unit = AXES[x] ?? x;
  if (!rows.length) {
    $("#front").textContent = "";
    place.replaceChildren(h("p", null, `No model here has a value for ${unit}.`));
    return;
  }
  const front = paretoFront(rows, x, y);
  const counts = new Map();
  for (const row of rows) counts.set(row.family, (counts.get(row.family) ?? 0) + 1);
  const large = [...counts].sort((a, b) => b[1] - a[1]).slice(0, counts.size > 8 ? 7 : 8).map(([family]) => family);
  const group = (row) => (large.includes(row.family) ? row.family ?? "unknown" : "other");
  const domain = [...large.map((family) => family ?? "unknown"), ...(counts.size > 8 ? ["other"] : [])];
  const kinds = [...new Set(rows.map((row) => row.origin))];
  const symbols = { converted: "circle", native: "star", batchnorm: "square" };
  const width = place.clientWidth;
  const extent = d3.extent(rows, (row) => row[x]);
  const log = state.log === "1" && extent[0] > 0;
  const at = (log ? d3.scaleLog : d3.scaleLinear)(extent[0] === extent[1] ? [extent[0] * 0.9, extent[1] * 1.1] : extent, [55, width - 20]);
  const titled = [];
  for (const row of [...front].reverse()) {
    const room = 6.5 * brief(row).length + 14;
    if (at(row[x]) > 55 + room && titled.every((other) => at(other[x]) - at(row[x]) > 6.5 * brief(other).length + 14)) titled.push(row);
  }
  const marks = state.pareto === "1" ? [
    Plot.line(front, { x, y, curve: "step-after", stroke: "var(--accent)", strokeWidth: 1.5 }),
    Plot.text(titled, { x, y, text: brief, textAnchor: "end", dx: -6, dy: -8, fontSize: 11, fill: "var(--text)", stroke: "var(--page)", strokeWidth: 4 }),
  ] : [];
  const plot = Plot.plot({
    width, height: Math.max(260, Math.min(400, width * 0.5)), marginLeft: 50, marginRight: 20, marginBottom: 48, marginTop: 24,
    style: { background: "transparent", fontSize: "12px", color: "var(--text)" },
    x: { type: log ? "log" : "linear", label: `${unit} →`, grid: true, nice: !log, ticks: width < 600 ? 4 : 8, tickSize: 0, tickFormat: (value) => short(value), ...(extent[0] === extent[1] && { domain: [extent[0] * 0.9, extent[1] * 1.1] }) },
    y: { label: `↑ ${y === "top1" ? "top-1" : "top-5"} (%)`, grid: true, nice: true },
    color: { domain, range: ["#4269d0", "#e8a317", "#e4572e", "#3aa394", "#3c9a43", "#c257a8", "#8a63d2", "#868e96"], legend: false },
    symbol: { domain: kinds, range: kinds.map((kind) => symbols[kind] ?? "diamond") },
    marks: [
      Plot.dot(rows, { x, y, fill: group, stroke: "var(--page)", strokeWidth: 0.4, fillOpacity: 0.75, symbol: "origin", r: (row) => (row.origin === "converted" ? 3.5 : 6), href: (row) => link({ model: row.label }), ariaLabel: (row) => `${row.key}: ${number(row[y], 2)} %, ${short(row[x])} ${unit}` }),
      ...marks,
      Plot.tip(rows, Plot.pointer({ x, y, title: (row) => [row.key, `${y === "top1" ? "top-1" : "top-5"} ${number(row[y], 2)} %`, `${short(row.gmacs)} GMACs, ${short(row.params)} M parameters`, ...(["gmacs", "params"].includes(x) ? [] : [`${short(row[x])} ${unit}`])].join("\n"), fill: "var(--card)", stroke: "var(--line)" })),
    ],
    r: { type: "identity" },
  });
  const svg = plot.tagName === "svg" ? plot : $("svg", plot);
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", `Scatter plot of ${rows.length} models: accuracy over ${unit}. The table below has the same figures.`);
  // Only models on the front are tab stops; the table has all others.
  const stops = new Set(front.map((row) => row.key));
  [...svg.querySelectorAll("a")].forEach((link) => {
    const text = $("[aria-label]", link)?.getAttribute("aria-label") ?? "";
    const name = text.slice(0, text.lastIndexOf(":"));
    if (!stops.has(name)) link.setAttribute("tabindex", "-1");
    link.setAttribute("aria-label", text);
  });
  // Hovering shows the nearest point, so a click anywhere beside it opens that model.
  svg.addEventListener("click", (event) => {
    if (!event.target.closest("a") && plot.value) location.hash = link({ model: plot.value.label });
  });
  const legend = h("p", { class: "legend" }, ...domain.map((name) => {
    const spot = h("i", { "aria-hidden": "true" });
    spot.style.background = plot.scale("color").apply(name);
    return h("span", null, spot, named(name));
  }), ...(kinds.length > 1 || kinds[0] !== "converted" ? kinds.map((kind) => h("span", null, `${{ circle: "●", star: "★", square: "■" }[symbols[kind]] ?? "◆"} ${kind}`)) : []));
  place.replaceChildren(legend, plot);
  $("#front").replaceChildren(...(state.pareto === "1" ? [h("details", { open: frontOpen, ontoggle: (event) => { frontOpen = event.target.open; } },
    h("summary", null, `Pareto front: ${front.length} models; no other model shown is both cheaper and more accurate`),
    h("ol", null, ...front.map((row) => h("li", null, h("a", { href: link({ model: row.label }) }, named(row.key)), ` ${number(row[y], 2)} %, ${short(row[x])}`))))] : []));
}

// A model's page

function fact(term, value) {
  return value == null || value === "" ? [] : [h("dt", null, term), h("dd", null, value)];
}
function sourceText(row) {
  const { measured, date, table, seeds } = row.source;
  return [measured, date, `table ${table}`, seeds && `seeds ${seeds}`].filter(Boolean).join(", ");
}
function snippet(model) {
  const name = JSON.stringify(model.run ? `local-dir:${model.run.replace(/\*$/, model.seed)}` : model.name);
  return `import timm\nimport ubn_zoo\n\nmodel = timm.create_model(${name}, pretrained=True).eval()\n` +
    "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))";
}
function siblingOf(model) {
  return results(model).map(([, row]) => row.sibling).find(Boolean);
}
function showModel() {
  const section = $("#model");
  const variants = data.models.filter((model) => model.label === state.model);
  const back = h("p", null, h("a", { href: listAddress }, "← all models"));
  if (!variants.length) {
    section.replaceChildren(back, h("h2", { tabindex: "-1" }, "No such model"), h("p", null, named(state.model)));
    return;
  }
  const model = variants[0];
  const sibling = siblingOf(model);
  const twin = data.models.find((other) => other.run ? other.run === sibling : other.name === sibling);
  const code = snippet(model);
  const rows = variants.flatMap(results);
  const heads = ["Test set", "Pixels", "Rank", "Top-1", "95 % interval or spread", "Top-5", "Δ BN", "Measured"];
  const speed = (prefix) => model[`${prefix}_samples_per_sec`] &&
    `${short(model[`${prefix}_samples_per_sec`])} images/s; BatchNorm in the same run ${short(model[`${prefix}_samples_per_sec_bn`]) || "not measured"}`;
  fill(section,
    back,
    h("h2", { tabindex: "-1" }, named(model.name)),
    model.run && h("p", null, "Run ", named(model.run)),
    h("p", null, h("span", { class: `badge ${model.origin}` }, model.origin), " ", model.settings && named(model.settings),
      h("a", { class: "button", href: link({ compare: JSON.stringify([model.key, twin?.key ?? ""]) }) }, twin ? "Compare with its sibling" : "Compare")),
    h("div", { class: "columns" },
      h("dl", null,
        ...fact("Family", model.family && named(model.family)), ...fact("Norm", model.norm && named(model.norm)),
        ...fact("Parameters", model.params && `${model.params} M`),
        ...variants.flatMap((each) => fact(`Cost at ${each.img_size} pixels`, each.gmacs && `${each.gmacs} GMACs, ${each.macts} M activations`)),
        ...fact("Preprocessing", model.crop_pct && `crop ${model.crop_pct}, ${model.interpolation}`),
        ...fact("License of the weights", named(model.license ?? "not stated")),
        ...fact("SHA-256 of the weights", model.weights_sha256 && h("code", null, model.weights_sha256)),
        ...fact("Training", speed("train")), ...fact("Inference", speed("infer")),
        ...fact("Peak memory, training", model.peak_memory && `${short(model.peak_memory)} MiB`),
        ...fact("Measured on", model.speed_setup && named(model.speed_setup)),
        ...Object.entries(data.speed).flatMap(([card, title]) => fact(`Sibling's inference, by timm`, model[`${card}_bn`] && `${short(model[`${card}_bn`])} images/s on ${title}`))),
      h("div", null,
        h("h3", null, "Load it"), h("pre", { tabindex: "0" }, h("code", null, code)),
        h("button", { type: "button", onclick: (event) => copy(code, event.target) }, "Copy"),
        h("h3", null, "BatchNorm sibling"),
        h("p", null, sibling ? (twin ? h("a", { href: link({ model: twin.label }) }, named(twin.label)) :
          model.origin === "converted" ? h("a", { href: `https://huggingface.co/timm/${encodeURIComponent(sibling)}`, rel: "noreferrer" }, named(sibling)) : named(sibling)) : "not recorded"),
        model.origin === "converted" && h("p", { class: "quiet" }, "These are the sibling's weights, converted exactly: the model computes the same function, so timm's accuracies hold for it until it is trained further."))),
    h("h3", { id: "results-of" }, "Results"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "results-of" }, h("table", null,
      h("thead", null, h("tr", null, ...heads.map((text) => h("th", { scope: "col", class: text === "Test set" || text === "Measured" ? "left" : "" }, text)))),
      h("tbody", null, ...rows.map(([set, row]) => h("tr", null,
        h("th", { scope: "row", class: "left" }, h("a", { href: link({ set: set.name }) }, named(set.title))),
        ...[row.img_size ?? "", row.rank == null ? "–" : `${row.rank} of ${set.rows.length}`, number(row.top1, 2), spread(row), number(row.top5, 2)].map((text) => h("td", null, String(text))),
        h("td", null, differenceCell(row)), h("td", { class: "left" }, named(sourceText(row)))))))),
    ...rows.map(([, row]) => row.source.command).filter((command, place, all) => command && all.indexOf(command) === place)
      .map((command) => h("p", null, "Measured by ", h("code", null, command))),
  );
}
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(button.previousSibling);
    button.textContent = "Selected: press Ctrl+C";
  }
}

// Two models side by side

let chosen = [];
function choose(name, on) {
  chosen = on ? [...chosen, name].slice(-2) : chosen.filter((each) => each !== name);
  for (const box of document.querySelectorAll("[data-key]")) box.checked = chosen.includes(box.dataset.key);
  const tray = $("#tray");
  tray.hidden = !chosen.length;
  $("span", tray).replaceChildren(...chosen.flatMap((each, place) => [place ? " and " : "", named(each)]), chosen.length === 1 ? ": choose a second model" : "");
  $("a", tray).href = link({ compare: JSON.stringify(chosen) });
}
function showCompare() {
  const section = $("#compare");
  let keys;
  try { keys = JSON.parse(state.compare); } catch { keys = []; }
  const pair = [0, 1].map((place) => data.models.find((model) => model.key === keys?.[place]));
  const list = h("datalist", { id: "keys" }, ...data.models.map((model) => h("option", { value: model.key })));
  const pick = (place) => h("input", {
    list: "keys", value: pair[place]?.key ?? "", "aria-label": `${place ? "Second" : "First"} model`, placeholder: "name of a model", autocomplete: "off",
    onchange: (event) => {
      const wanted = [pair[0]?.key ?? "", pair[1]?.key ?? ""];
      wanted[place] = event.target.value;
      location.hash = link({ compare: JSON.stringify(wanted) });
    },
  });
  const lineOf = (term, values, difference = "") => h("tr", null, h("th", { scope: "row", class: "left" }, term), ...values.map((value) => h("td", null, value ?? "")), h("td", null, difference));
  const facts = [["Weights", "origin"], ["Norm", "norm"], ["Family", "family"], ["License", "license"], ["Pixels", "img_size"], ["Parameters, M", "params"], ["GMACs", "gmacs"], ["Activations, M", "macts"], ["Inference, images/s", "infer_samples_per_sec"], ["Training, images/s", "train_samples_per_sec"],
    ...Object.entries(data.speed).map(([card, title]) => [`BN sibling, images/s, ${title.split(",")[0]}`, `${card}_bn`])];
  const ratio = (a, b) => (typeof a === "number" && typeof b === "number" && a ? `× ${(b / a).toPrecision(3)}` : "");
  const rows = !pair[0] || !pair[1] ? [] : [
    ...facts.map(([term, name]) => [term, pair.map((model) => model[name])]).filter(([, values]) => values.some((value) => value != null))
      .map(([term, values]) => lineOf(term, values.map((value) => value == null ? "" : named(String(value))), ratio(...values))),
    ...data.sets.map((set) => [set, pair.map((model) => set.rows.find((row) => row.key === model.key))]).filter(([, found]) => found.some(Boolean))
      .map(([set, [a, b]]) => lineOf(named(`${set.title}, top-1`), [a, b].map((row) => row && `${number(row.top1, 2)} (${spread(row) || "one run"})`),
        a && b ? `${signed(b.top1 - a.top1)}${a.top1_low != null && b.top1_low != null && a.top1_low <= b.top1_high && b.top1_low <= a.top1_high ? ", intervals overlap" : ""}` : "")),
  ];
  section.replaceChildren(
    h("p", null, h("a", { href: listAddress }, "← all models")), h("h2", { tabindex: "-1" }, "Compare two models"), list,
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison" }, h("table", { class: "comparison" },
      h("thead", null, h("tr", null, h("td", null, ""), h("th", { scope: "col" }, pick(0)), h("th", { scope: "col" }, pick(1)), h("th", { scope: "col" }, "Second vs. first"))),
      h("tbody", null, ...rows))),
    rows.length ? h("p", { class: "quiet" }, "Overlapping intervals do not prove that two models are equal: they were measured on the same images, so a paired test on saved predictions can tell more.") : h("p", null, "Type or choose two names."));
}

// Everything else

function route(focus) {
  read();
  const view = state.model ? "model" : state.compare ? "compare" : "list";
  for (const name of ["list", "model", "compare"]) $(`#${name}`).hidden = name !== view;
  ({ list: showList, model: showModel, compare: showCompare })[view]();
  document.title = view === "model" ? `${state.model} · UBN-Zoo leaderboard` : "UBN-Zoo leaderboard";
  if (focus && view !== "list") {
    scrollTo(0, 0);
    $(`#${view} h2`).focus();
  }
}
function csv(rows) {
  const columns = ["rank", "name", "run", "settings", "img_size", "top1", "top1_low", "top1_high", "top1_std", "top5", "top1_diff", "params", "gmacs", "macts", "norm", "origin", "family", "license", "weights_sha256"];
  const cell = (value) => {
    if (value == null) return "";
    const text = typeof value === "string" && /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows.map((row) => columns.map((name) => row[name]))].map((values) => values.map(cell).join(",") + "\n").join("");
}

options($("#filters").elements.set, data.sets.map((set) => [set.name, set.title]));
options($("#chart [name=x]"), Object.entries(AXES));
$("#filters").addEventListener("input", (event) => update({ [event.target.name]: event.target.value, ...(event.target.name === "set" && { family: "", license: "" }) }));
$("#filters").addEventListener("submit", (event) => event.preventDefault());
$("#filters").addEventListener("reset", (event) => { event.preventDefault(); history.replaceState(null, "", "#"); read(); showList(); });
// The chart also sends such events when the pointer moves.
$("#chart").addEventListener("input", ({ target }) => target.name && update({ [target.name]: target.type === "checkbox" ? (target.checked ? "1" : "0") : target.value }));
$("#chart").addEventListener("toggle", () => showChart());
$("#columns div").append(...COLUMNS.filter((column) => !["label", "compare"].includes(column.name)).map((column) =>
  h("label", { class: "check", title: column.help }, h("input", { type: "checkbox", checked: shown.has(column.name), onchange: (event) => { shown[event.target.checked ? "add" : "delete"](column.name); shownVersion++; showHead(); showBody(); } }), column.title)));
$("#download").addEventListener("click", () => {
  const link = h("a", { download: `${state.set}.csv`, href: URL.createObjectURL(new Blob([csv(visible)], { type: "text/csv" })) });
  link.click();
  URL.revokeObjectURL(link.href);
});
$("#tray button").addEventListener("click", () => { chosen.slice().forEach((name) => choose(name, false)); });
$("#tray a").addEventListener("click", () => { $("#tray").hidden = true; });
$("[data-skip]").addEventListener("click", (event) => { event.preventDefault(); $("#scroll").focus(); });
addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select") && !$("#list").hidden) {
    event.preventDefault();
    $("#filters [name=q]").focus();
  }
});

const THEMES = ["auto", "light", "dark"];
const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
function theme(name) {
  const kept = THEMES.includes(name) ? name : "auto";
  document.documentElement.dataset.theme = kept;
  $("#theme").textContent = `Theme: ${kept}`;
  try { localStorage.setItem("theme", kept); } catch { /* Storage is off; the choice lasts until the page is left. */ }
}
$("#theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
theme(stored());

$("#chart").open = innerWidth > 640;
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; if (!$("#list").hidden) showChart(); } });
addEventListener("hashchange", () => route(true));
$("#sources").replaceChildren("Inherited figures: ", h("a", { href: data.source, rel: "noreferrer" }, "timm's results"), ` of ${data.date}, Apache-2.0. GMACs and activations are counted by this project. Written by ubn-zoo ${data.version}.`);
route(false);
