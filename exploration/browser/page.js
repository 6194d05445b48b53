"use strict";
const START = __START__;  // networks: names; name and facts of the first network; mp4: whether MP4 can be written
const $ = id => document.getElementById(id);
const CHUNK = 8;  // images per request, so that the first appear early
const LIMITS = {cells: 64, seed: 2 ** 32 - 1, frames: 240};
const VIEWS = ["images", "mixing", "morph"];

// The state of the page: one text per key, which the address and the controls with a `data-key` mirror.
let state = {}, facts = START.facts, cellCount = 24, timer = null;
const defaults = () => ({
  network: START.name, view: "images", seed: "0", other: "", first: "0",
  trunc: "1", class: "0", label: facts.label.join(","), noise: "const",
  right: "0", down: "0", rotate: "0",
  directions: facts.directions[0]?.name ?? "", layers: "all", edit: "",
  rows: "0-3", cols: "4-9", styles: Object.keys(facts.groups)[0] ?? "",
  from: "0", to: "1", interpolation: "w", frames: "24", fps: "12", loop: "1", frame: "0", x: "", y: "",
});
const films = {key: "", images: []};  // frames of the morph that have arrived

function set(changes) {
  state = {...state, ...Object.fromEntries(Object.entries(changes).map(([key, value]) => [key, String(value)]))};
  refresh();
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = defaults();
  for (const key of Object.keys(state)) if (given.has(key)) state[key] = given.get(key);
  if (!VIEWS.includes(state.view)) state.view = "images";
  if (given.has("seed") && !given.has("first") && isSeed(state.seed)) state.first = state.seed;
}

function hashOf() {
  const usual = defaults(), isShown = ([key, value]) => value !== usual[key] || (key === "first" && state.seed !== usual.seed);
  const shown = Object.entries(state).filter(isShown);
  return new URLSearchParams(shown).toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
}

let writing = null;
function writeAddress() {  // not at every step of a slider: browsers limit the rate, and Safari raises an error
  writing ??= setTimeout(() => {
    const hash = hashOf();
    writing = null;
    if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname);
  }, 300);
}

const isSeed = text => /^\d{1,10}$/.test(text) && Number(text) <= LIMITS.seed;
const stylesOf = () => state.styles.split(",").filter(Boolean);
const signed = (number, digits) => Number(number) ? `${number > 0 ? "+" : "−"}${Math.abs(number).toFixed(digits)}` : "0";
const editsOf = () => new Map(state.edit.split(",").filter(Boolean).map(part => part.split(":")));
const poseKeys = () => facts.rotates ? ["right", "down", "rotate"] : facts.shifts ? ["right", "down"] : [];
const isMoved = () => poseKeys().some(key => Number(state[key]) !== 0);
const stem = () => state.network.replace(/\.pkl$/, "");

// Requests: each part of the page asks for addresses, and shows the answers as they arrive. One request at a time is
// sent, for the first part that is out of date, so that a slider never queues more than the latest position. Images
// of a `live` part follow a moving slider with a delay; other answers are shown only if they are still wanted.
class Part {
  constructor(id, ask, show, live = false) {
    Object.assign(this, {box: $(id), ask, show, live, wanted: [], answers: []});  // answers: {address, problem}
  }
  refresh() {
    this.wanted = this.ask();
    this.answers.length = Math.min(this.answers.length, this.wanted.length);
    this.mark();
  }
  mark() {
    this.box.setAttribute("aria-busy", this.next() >= 0);
    this.box.classList.toggle("outdated", this.next() >= 0 || this.problem !== "");
  }
  next() { return this.wanted.findIndex((address, i) => address !== this.answers[i]?.address); }
  get problem() { return this.answers.find((one, i) => one?.problem && one.address === this.wanted[i])?.problem ?? ""; }
  async load() {
    const i = this.next(), address = this.wanted[i];
    let problem = "";
    try {
      const response = await fetch(address), found = await response.json();
      if (!response.ok) problem = found.error;
      else if (this.live || address === this.wanted[i]) this.show(found, i);
    } catch {
      problem = "No response: is generate.py play still running?";
    }
    this.answers[i] = {address, problem};
    this.mark();
  }
}

let isWorking = false;
async function work() {
  if (isWorking) return;
  isWorking = true;
  for (let part; (part = parts.find(part => part.next() >= 0));) {
    await part.load();
    showProblem();
  }
  isWorking = false;
}

function showProblem() {
  const problem = parts.find(part => part.problem)?.problem ?? "";
  if ($("problem").textContent !== problem) $("problem").textContent = problem;  // an alert is read at every change
}

const address = (path, query) => `${path}?${new URLSearchParams({...settings(), ...query})}`;
function settings() {
  const query = {network: state.network, trunc: state.trunc, noise: state.noise};
  if (facts.classes) query.class = state.class;
  if (facts.label.length) query.label = state.label;
  for (const key of poseKeys()) if (Number(state[key]) !== 0) query[key] = state[key];
  return query;
}
function edits() {
  return state.edit ? {directions: state.directions, layers: state.layers, edit: state.edit} : {};
}
function chosen() {
  const mixed = state.other !== "" && stylesOf().length ? {other: state.other, styles: state.styles} : {};
  return {of: state.seed, ...mixed, ...edits()};
}
function morph() {
  return {of: `${state.from},${state.to}`, frames: state.frames, fps: state.fps, interpolation: state.interpolation, loop: state.loop};
}

const countTiles = () => isSeed(state.first) ? Math.min(cellCount, LIMITS.seed - Number(state.first) + 1) : 0;

function askGrid() {
  if (state.view !== "images") return [];
  if (!isSeed(state.first)) return [address("image", {of: state.first})];  // the answer names the problem
  const first = Number(state.first), count = countTiles();
  return Array.from({length: Math.ceil(count / CHUNK)}, (_, i) => {
    const start = first + i * CHUNK;
    return address("images", {of: `${start}-${Math.min(start + CHUNK, first + count) - 1}`});
  });
}

function askMorph() {
  if (state.view !== "morph") return [];
  const frames = Number(state.frames);
  if (!(frames >= 1 && frames <= LIMITS.frames)) return [address("morph", {...morph(), start: 0, count: 1})];  // as above
  return Array.from({length: Math.ceil((frames + 1) / CHUNK)}, (_, i) => {
    return address("morph", {...morph(), start: i * CHUNK, count: Math.min(CHUNK, frames + 1 - i * CHUNK)});
  });
}

const parts = [
  new Part("snapshots", () => [`network?${new URLSearchParams({network: state.network})}`], showNetwork),
  new Part("large", () => [address("image", chosen())], found => {
    $("large").src = found.images[0];
    showCommand("image", found.command);
  }, true),
  new Part("attention", () => state.x && facts.attention ? [address("attention", {...chosen(), x: state.x, y: state.y})] : [], showMaps, true),
  new Part("saved", () => state.view === "images" && facts.saved.length ? [address("images", {of: facts.saved.slice(0, LIMITS.cells).join(",")})] : [], found => {
    $("saved").replaceChildren(...found.images.map((image, i) => tile(image, facts.saved[i])));
    mark();
  }),
  new Part("grid", askGrid, (found, i) => {
    found.images.slice(0, countTiles()).forEach((image, j) => {  // tiles are kept, so that a focused one stays focused
      const number = i * CHUNK + j, name = String(Number(state.first) + number);
      $("grid").append(...$("grid").children[number] ? [] : [tile(image, name)]);
      fill($("grid").children[number], image, name);
    });
    mark();
  }),
  new Part("table", () => state.view === "mixing" ? [address("mixtures", {rows: state.rows, cols: state.cols, styles: state.styles, ...edits()})] : [], showTable, true),
  new Part("film", askMorph, (found, i) => {
    found.images.forEach((image, j) => { films.images[i * CHUNK + j] = image; });
    showCommand("morph", found.command);
    showFrame();
  }),
];

// Controls follow the state.
function refresh() {
  if (state.view === "mixing" && !Object.keys(facts.groups).length) state.view = "images";
  writeAddress();
  for (const control of document.querySelectorAll("[data-key]")) {
    if (control === document.activeElement && control.type !== "range" && control.tagName === "INPUT") continue;
    if (control.type === "checkbox") control.checked = state[control.dataset.key] === "1";
    else control.value = state[control.dataset.key];
  }
  $("psi").textContent = Number(state.trunc).toFixed(2);
  for (const key of ["right", "down", "rotate"]) {
    const isAngle = key === "rotate", output = document.querySelector(`label[for=${key}] output`);
    output.textContent = isAngle ? `${signed(state[key], 0)}°` : `${signed(100 * state[key], 1)} %`;
  }
  document.querySelector("main").dataset.view = state.view;
  for (const view of VIEWS) {
    $(view).hidden = view !== state.view;
    $(`tab-${view}`).setAttribute("aria-selected", view === state.view);
    $(`tab-${view}`).tabIndex = view === state.view ? 0 : -1;
  }
  for (const box of document.querySelectorAll("#styles input")) box.checked = stylesOf().includes(box.value);
  const names = START.networks, position = names.indexOf(state.network);
  $("older").disabled = position <= 0;
  $("newer").disabled = position < 0 || position === names.length - 1;
  $("attention").hidden = !(state.x && facts.attention);
  showChosen();
  showSliders();
  for (const part of parts) part.refresh();
  while ($("grid").children.length > countTiles()) $("grid").lastChild.remove();
  const key = askMorph().join();
  if (films.key !== key) Object.assign(films, {key, images: []});
  if (state.view !== "morph") stop();
  showFrame();
  mark();
  showProblem();
  work();
}

function showNetwork(found) {
  facts = found;
  const [height, width] = facts.size;
  $("name").textContent = document.title = state.network;
  $("name").title = facts.path;
  const count = number => number.toLocaleString("en", {maximumFractionDigits: 3});
  $("facts").textContent = [
    facts.family, `${width}×${height}`, facts.kimg ? `${count(facts.kimg)} kimg` : "",  // 0 is unknown, or untrained
    `${count(facts.parameters)} parameters`,
  ].filter(Boolean).join(" · ");
  $("snapshots").hidden = START.networks.length < 2;
  $("network").replaceChildren(...START.networks.map(name => new Option(name)));
  $("classes").hidden = !facts.classes;
  $("class").replaceChildren(...Array.from({length: facts.classes}, (_, i) => new Option(i)));
  $("labels").hidden = !facts.label.length;
  $("noises").hidden = !facts.noise;
  $("rights").hidden = $("downs").hidden = !facts.shifts;
  $("rotations").hidden = !facts.rotates;
  $("tab-mixing").hidden = !Object.keys(facts.groups).length;
  $("styles").replaceChildren(...Object.entries(facts.groups).map(([name, styles]) => {
    const label = document.createElement("label"), box = document.createElement("input");
    Object.assign(box, {type: "checkbox", value: name, onchange: chooseStyles});
    label.append(box, ` ${name} (${styles})`);
    return label;
  }));
  $("directions").replaceChildren(...facts.directions.map(found => new Option(found.title, found.name)));
  $("layers").replaceChildren(...["all", ...Object.keys(facts.groups)].map(name => new Option(name)));
  $("large").tabIndex = facts.attention ? 0 : -1;
  if (!facts.saved.length) $("saved").replaceChildren();
  refresh();
}

function chooseStyles() {
  set({styles: [...document.querySelectorAll("#styles input:checked")].map(box => box.value).join(",")});
}

function showChosen() {
  const isMixed = state.other !== "" && stylesOf().length, name = isSeed(state.seed) ? `Seed ${state.seed}` : state.seed;
  const text = isMixed ? `${name}, styles ${state.styles} of seed ${state.other}` : name;
  $("caption").textContent = $("large").alt = text + (state.edit ? ", edited" : "") + (isMoved() ? ", moved" : "");
  $("hint").textContent = facts.attention ? "Click it for attention maps." : "";
}

function showSliders() {
  const chosen = facts.directions.find(found => found.name === state.directions);
  $("edits").hidden = !facts.directions.length;
  $("layered").hidden = !chosen || "on" in chosen || !Object.keys(facts.groups).length;
  $("on").textContent = chosen && "on" in chosen ? `styles ${chosen.on}` : "";
  const count = Math.min(chosen?.count ?? 0, 32), key = `${state.network} ${state.directions} ${count}`;
  if ($("sliders").dataset.of !== key) {
    $("sliders").dataset.of = key;
    $("sliders").replaceChildren(...Array.from({length: count}, (_, i) => slider(i)).flat());
  }
  const strengths = editsOf();
  for (const input of $("sliders").querySelectorAll("input")) {
    const strength = Number(strengths.get(input.dataset.index) ?? 0);
    input.value = strength;
    input.nextSibling.textContent = signed(strength, 1);
    for (const text of [input.previousSibling, input.nextSibling]) text.classList.toggle("edited", strength !== 0);
  }
  $("reset").disabled = !state.edit;
}

function slider(i) {
  const label = document.createElement("label"), input = document.createElement("input"), output = document.createElement("output");
  label.textContent = i;
  label.htmlFor = input.id = `direction-${i}`;
  input.ariaLabel = `direction ${i}`;
  Object.assign(input, {type: "range", min: -5, max: 5, step: 0.1, title: "double-click to reset"});
  input.dataset.index = i;
  const change = strength => {
    const strengths = editsOf();
    if (Number(strength)) strengths.set(String(i), Number(strength)); else strengths.delete(String(i));
    set({edit: [...strengths].sort(([a], [b]) => a - b).map(pair => pair.join(":")).join(",")});
  };
  input.oninput = () => change(input.value);
  input.ondblclick = () => change(0);
  return [label, input, output];
}

function tile(image, name) {
  const cell = document.createElement("button");
  cell.append(document.createElement("img"), document.createElement("span"));
  cell.onclick = () => set({seed: cell.dataset.seed, other: cell.dataset.other ?? ""});
  fill(cell, image, name);
  return cell;
}

function fill(cell, image, name) {
  const [picture, caption] = cell.children;
  picture.src = image;
  picture.alt = isSeed(name) ? `seed ${name}` : name;
  caption.textContent = cell.dataset.seed = name;
}

function showTable(found) {
  const row = cells => { const line = document.createElement("tr"); line.append(...cells); return line; };
  const cell = (kind, ...children) => { const box = document.createElement(kind); box.append(...children); return box; };
  const mixture = (image, r, c) => {
    const button = tile(image, String(r));
    button.lastChild.remove();
    button.dataset.other = c;
    button.firstChild.alt = button.title = `${r} with styles of ${c}`;
    return cell("td", button);
  };
  const head = one => cell("th", tile(one.image, String(one.source)));
  $("table").style.setProperty("--columns", found.cols.length + 1);
  $("table").replaceChildren(row([cell("th"), ...found.cols.map(head)]), ...found.rows.map((one, i) => {
    return row([head(one), ...found.mixtures[i].map((image, j) => mixture(image, one.source, found.cols[j].source))]);
  }));
  showCommand("mixtures", found.command);
  mark();
}

function mark() {
  const other = stylesOf().length ? state.other : "";
  for (const button of document.querySelectorAll("[data-seed]")) {
    button.ariaCurrent = button.dataset.seed === state.seed && (button.dataset.other ?? "") === other;
  }
}

function showMaps(found) {
  $("maps").replaceChildren(...found.maps.map(map => {
    const figure = document.createElement("figure"), image = document.createElement("img"), caption = document.createElement("figcaption");
    image.src = map.image;
    image.alt = caption.textContent = map.title;
    figure.append(image, caption);
    return figure;
  }));
  showCommand("attention", found.command);
}

function showCommand(name, command) {
  const code = document.querySelector(`[data-command=${name}]`), button = document.querySelector(`[data-copy=${name}]`);
  code.hidden = button.hidden = !command;
  code.replaceChildren(...command.split(/(?<= )(?=--)/).map(words => {  // lines break between options
    const span = document.createElement("span");
    span.textContent = words;
    return span;
  }));
  button.onclick = () => copy(command, button);
}

async function copy(text, button) {
  const before = button.dataset.text ??= button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select and copy";  // the browser denies access to the clipboard
  }
  setTimeout(() => { button.textContent = before; }, 1500);
}

// Morph
function showFrame() {
  const last = Number(state.frames) || 0, frame = Math.min(Number(state.frame) || 0, last);
  const show = (id, image) => { if (image && $(id).src !== image) $(id).src = image; };
  $("time").max = last;
  $("time").value = frame;
  $("number").textContent = `${frame} / ${last}`;
  show("start", films.images[0]);
  show("frame", films.images[frame]);
  show("end", films.images[last]);
}

function play() {
  if (timer) return stop();
  $("play").textContent = "Pause";
  let frame = Number(state.frame) || 0, step = 1;
  const advance = () => {
    const last = Number(state.frames);
    if (frame + step > last || frame + step < 0) {
      if (state.loop === "1") step = -step; else frame = -1;
    }
    frame = Math.max(0, Math.min(last, frame + step));
    state.frame = String(frame);
    showFrame();
    timer = setTimeout(advance, 1000 / Math.max(1, Number(state.fps) || 1));
  };
  timer = setTimeout(advance, 0);
}

function stop() {
  clearTimeout(timer);
  timer = null;
  $("play").textContent = "Play";
}

async function exportVideo(format) {
  $("exporting").textContent = `Writing ${format.toUpperCase()} …`;
  try {
    const response = await fetch(address("video", {...morph(), format}));
    if (!response.ok) throw new Error((await response.json()).error);
    const url = URL.createObjectURL(await response.blob());
    download(url, `${stem()}-${state.from}-${state.to}.${format}`);
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    $("exporting").textContent = "";
  } catch (error) {
    $("exporting").textContent = error.message;
  }
}

function download(url, name) {
  const anchor = document.createElement("a");
  Object.assign(anchor, {href: url, download: name});
  anchor.click();
}

async function saveImage() {  // of the current settings, which may be ahead of the image on the page
  const mixed = state.other !== "" && stylesOf().length ? `-${state.other}` : "", edited = (state.edit ? "-edited" : "") + (isMoved() ? "-moved" : "");
  const name = isSeed(state.seed) ? `seed${state.seed.padStart(4, "0")}` : state.seed;
  const file = `${stem()}-${name}${mixed}${edited}.png`, response = await fetch(address("image", chosen()));
  if (response.ok) download((await response.json()).images[0], file);  // otherwise the page names the problem
}

// Moving
function chooseSeed(seed) {
  seed = Math.max(0, Math.min(LIMITS.seed, seed));
  const first = Number(state.first), isVisible = seed >= first && seed < first + cellCount;
  set({seed, other: "", first: isVisible ? first : seed});
}

const stepSeed = step => chooseSeed(isSeed(state.seed) ? Number(state.seed) + step : 0);
const page = step => set({first: Math.max(0, Math.min(LIMITS.seed - cellCount + 1, (Number(state.first) || 0) + step * cellCount))});
const randomSeed = () => chooseSeed(crypto.getRandomValues(new Uint32Array(1))[0]);
const openView = view => { if (!$(`tab-${view}`).hidden) set({view}); };

function stepSnapshot(step) {
  const name = START.networks[START.networks.indexOf(state.network) + step];
  if (name) set({network: name});
}

function attend(x, y) {
  const [height, width] = facts.size, within = (value, limit) => Math.min(limit - 1, Math.max(0, value));
  set({x: within(x, width), y: within(y, height)});
}

function fitGrid() {
  const box = $("grid"), width = $("work").clientWidth - 30;
  const columns = Math.max(4, Math.floor((width + 8) / 120)), side = (width + 8) / columns;
  const rows = Math.max(3, Math.ceil((innerHeight - box.getBoundingClientRect().top - scrollY - 20) / (side + 22)));
  const count = Math.min(rows, Math.floor(LIMITS.cells / columns)) * columns;
  if (count !== cellCount) { cellCount = count; refresh(); }
}

for (const control of document.querySelectorAll("[data-key]")) {
  const key = control.dataset.key, event = control.type === "range" ? "oninput" : "onchange";
  control[event] = () => set({[key]: control.type === "checkbox" ? Number(control.checked) : control.value.trim()});
}
for (const key of ["right", "down", "rotate"]) $(key).ondblclick = () => set({[key]: 0});
$("seed").onchange = () => isSeed($("seed").value.trim()) ? chooseSeed(Number($("seed").value)) : set({seed: $("seed").value.trim(), other: ""});
$("directions").onchange = $("layers").onchange = event => set({[event.target.dataset.key]: event.target.value, edit: ""});
$("reset").onclick = () => set({edit: ""});
$("random").onclick = randomSeed;
$("before").onclick = () => stepSeed(-1);
$("after").onclick = () => stepSeed(1);
$("previous").onclick = () => page(-1);
$("next").onclick = () => page(1);
$("older").onclick = () => stepSnapshot(-1);
$("newer").onclick = () => stepSnapshot(1);
$("save").onclick = saveImage;
$("link").onclick = () => copy(new URL(`#${hashOf()}`, location.href).href, $("link"));
$("hide").onclick = () => set({x: "", y: ""});
$("play").onclick = play;
$("time").oninput = () => { stop(); set({frame: $("time").value}); };
$("mp4").disabled = !START.mp4;
$("mp4").title = START.mp4 ? "" : "needs pip install '.[video]'";
$("mp4").onclick = () => exportVideo("mp4");
$("gif").onclick = () => exportVideo("gif");
for (const view of VIEWS) $(`tab-${view}`).onclick = () => openView(view);
for (const button of document.querySelectorAll("[data-end]")) button.onclick = () => set({[button.dataset.end]: state.seed});
$("large").onclick = event => {
  const box = $("large").getBoundingClientRect(), [height, width] = facts.size;
  if (facts.attention) attend(Math.floor((event.clientX - box.left) / box.width * width), Math.floor((event.clientY - box.top) / box.height * height));
};
$("large").onkeydown = event => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!step || !facts.attention) return;
  event.preventDefault();
  event.stopPropagation();
  const [height, width] = facts.size;
  if (state.x) attend(Number(state.x) + step[0], Number(state.y) + step[1]); else attend(width >> 1, height >> 1);
};

const KEYS = {
  ArrowLeft: () => stepSeed(-1), ArrowRight: () => stepSeed(1), r: randomSeed, "[": () => page(-1), "]": () => page(1),
  ",": () => stepSnapshot(-1), ".": () => stepSnapshot(1), 1: () => openView("images"), 2: () => openView("mixing"), 3: () => openView("morph"),
  0: () => set({edit: ""}), s: saveImage, l: () => $("link").click(), c: () => document.querySelector("[data-copy=image]").click(),
};
document.onkeydown = event => {
  const {target} = event, isButton = target.matches("button"), isBox = target.matches("[type=checkbox]");
  const isTyping = target.matches("select, summary, input:not([type=range], [type=checkbox])");
  if (event.ctrlKey || event.altKey || event.metaKey || isTyping) return;
  if (event.key === " " && state.view === "morph" && !isButton && !isBox) { event.preventDefault(); return play(); }
  if (event.key.startsWith("Arrow") && target.matches("[type=range]")) return;  // it moves the slider
  if (isButton && event.target.getAttribute("role") === "tab" && event.key.startsWith("Arrow")) {
    const shown = VIEWS.filter(view => !$(`tab-${view}`).hidden), step = event.key === "ArrowRight" ? 1 : -1;
    openView(shown[(shown.indexOf(state.view) + step + shown.length) % shown.length]);
    return $(`tab-${state.view}`).focus();
  }
  KEYS[event.key]?.();
};
onhashchange = () => { readAddress(); refresh(); };
onresize = fitGrid;

readAddress();
showNetwork(facts);
fitGrid();
