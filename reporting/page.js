// Return the index of the value nearest to x.
const nearest = (sorted, x) => {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= x) low = middle; else high = middle;
  }
  return x - sorted[low] < sorted[high] - x ? low : high;
};
const child = (parent, className, text = "") => {
  const element = parent.appendChild(document.createElement("div"));
  element.className = className;
  element.textContent = text;
  return element;
};
const panels = [...document.querySelectorAll(".panel")].map(element => ({
  element, axis: JSON.parse(element.dataset.axis), lines: JSON.parse(element.closest(".chart").dataset.lines),
}));

// A slider per run selects the visible images. Linked sliders show the images nearest to the same kimg.
const runs = [...document.querySelectorAll(".frames")].map(element => {
  const frames = [...element.querySelectorAll("figure")];
  return {
    frames, slider: element.querySelector("input"), button: element.querySelector("button"),
    colour: element.dataset.colour, kimg: frames.map(frame => Number(frame.dataset.kimg)), shown: frames.length - 1,
  };
});
const link = document.querySelector("#link");
const isLinked = () => !link || link.checked;
let chosen = Math.max(0, ...runs.flatMap(run => run.kimg));  // kimg

const show = (run, index) => {
  run.shown = index;
  run.frames.forEach((frame, i) => { frame.hidden = i !== index; });
  if (!run.slider) return;
  run.slider.value = index;
  run.slider.setAttribute("aria-valuetext", `kimg ${run.kimg[index]}`);
};
// Mark the chosen kimg in all charts: one line, or one per run where the runs are at different places.
const markPlaces = () => {
  document.querySelectorAll(".place").forEach(place => place.remove());
  for (const { element, axis } of panels) {
    const places = axis.name === "kimg" && isLinked() ? [[chosen, ""]]
      : runs.map(run => [run.frames[run.shown].dataset[axis.name], run.colour]);
    for (const [value, colour] of places) {
      const share = (value - axis.first) / (axis.last - axis.first);
      if (value === "" || !(0 <= share && share <= 1)) continue;
      const place = child(element, "place");
      place.style.left = `${100 * (axis.left + share * (axis.right - axis.left))}%`;
      place.style.borderColor = colour;
    }
  }
};
// Show the images of all runs nearest to a kimg.
const select = kimg => {
  chosen = kimg;
  for (const run of runs) show(run, nearest(run.kimg, kimg));
  markPlaces();
};
// Show an image of a run; linked runs follow.
const move = (run, index) => {
  chosen = run.kimg[index];
  if (isLinked()) for (const other of runs) show(other, nearest(other.kimg, chosen));
  show(run, index);
  markPlaces();
};

let player = null;  // the run whose images are played, and the timer
const stop = () => {
  if (!player) return;
  clearInterval(player.timer);
  player.run.button.textContent = "Play";
  player = null;
};
const play = run => {
  const step = () => {
    move(run, run.shown + 1);
    if (run.shown === run.frames.length - 1) stop();
  };
  if (run.shown === run.frames.length - 1) move(run, 0);
  run.button.textContent = "Pause";
  player = { run, timer: setInterval(step, 600) };
};
for (const run of runs) {
  show(run, run.shown);
  if (!run.slider) continue;
  run.slider.parentElement.hidden = false;
  run.slider.addEventListener("input", () => { stop(); move(run, Number(run.slider.value)); });
  run.button.addEventListener("click", () => {
    const isPlaying = player && player.run === run;
    stop();
    if (!isPlaying) play(run);
  });
}
if (link && runs.length > 1) {
  link.parentElement.hidden = false;
  link.addEventListener("change", () => isLinked() ? select(chosen) : markPlaces());
}
for (const anchor of document.querySelectorAll("a[data-kimg]")) {
  if (!panels.length) anchor.hash = "images";
  anchor.addEventListener("click", () => { stop(); select(Number(anchor.dataset.kimg)); });
}
if (runs.length) markPlaces();

// Show the values of all lines of a chart at the pointer.
for (const { element, axis, lines } of panels) {
  const cursor = child(element, "cursor"), reading = child(element, "reading");
  const hide = () => { cursor.hidden = reading.hidden = true; };
  const read = event => {
    const box = element.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    const x = axis.first + (share - axis.left) / (axis.right - axis.left) * (axis.last - axis.first);
    hide();
    if (share < axis.left || share > axis.right) return;
    reading.textContent = "";
    child(reading, "quiet", `${axis.label}: ${Number((x / axis.unit).toPrecision(4))}`);
    for (const line of lines) {
      const xs = line[axis.name], end = xs.length - 1;
      if (!(xs[0] <= x && x <= xs[end])) continue;
      child(reading, "", `${line.values[nearest(xs, x)]}  ${line.label}`).style.borderColor = line.colour;
    }
    cursor.hidden = reading.hidden = false;
    cursor.style.left = `${100 * share}%`;
    reading.style.left = share < 0.5 ? `${100 * share + 1}%` : "auto";
    reading.style.right = share < 0.5 ? "auto" : `${100 * (1 - share) + 1}%`;
  };
  hide();
  element.addEventListener("pointermove", read);
  element.addEventListener("pointerdown", read);
  element.addEventListener("pointerleave", hide);
}
