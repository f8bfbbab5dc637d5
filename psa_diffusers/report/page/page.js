"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const player = at("player"), stage = at("stage"), slider = at("frame"), wipe = at("wipe"), play = at("play");
  const dense = at("dense"), followers = [at("sparse"), at("heat")], videos = [dense, ...followers];
  const views = [...document.querySelectorAll("input[name=view]")];
  const last = data.frames - 1;
  let frame = 0, playing = false;

  const clip = () => data.clips[at("clip").value];
  const setting = () => at("setting").value;
  const decibels = (value) => (value === null ? "identical" : `PSNR ${value.toFixed(2)} dB`);

  // -- what is shown

  function load() {
    pause();
    const folder = `videos/${clip().name}/`, name = encodeURIComponent(setting());
    const sources = ["dense.mp4", `${name}.mp4`, `${name}.difference.mp4`];
    videos.forEach((video, i) => {
      video.src = folder + sources[i];
      video.playbackRate = Number(at("speed").value);
    });
    at("sparse-name").textContent = setting();
    const its = clip().settings[setting()];
    const parts = [its.identical ? "identical to dense" : decibels(its.psnr), `SSIM ${its.ssim.toFixed(4)}`];
    if (its.lpips !== null) parts.push(`LPIPS ${its.lpips.toFixed(4)}`);
    if (its.flicker !== null) parts.push(`flicker ${its.flicker.toFixed(3)}`);
    at("clip-figures").textContent = `${clip().name}, ${setting()}: ${parts.join(", ")}`;
    drawChart();
    seek(0);
  }

  function show(view) {
    views.forEach((radio) => (radio.checked = radio.value === view));
    stage.dataset.view = view;
    at("wipe-label").hidden = view !== "wipe";
  }

  function setWipe(share) {
    wipe.value = Math.min(100, Math.max(0, share));
    wipe.setAttribute("aria-valuetext", `${Math.round(wipe.value)} % dense`);
    stage.style.setProperty("--edge", `${wipe.value}%`);
  }

  function mark() {
    const value = clip().settings[setting()].frames[frame];
    const words = `Frame ${frame + 1} of ${data.frames}, ${decibels(value)}`;
    slider.value = frame;
    slider.setAttribute("aria-valuetext", words);
    const cursor = document.querySelector("#chart .cursor");
    if (cursor) ["x1", "x2"].forEach((end) => cursor.setAttribute(end, place(frame)));
    if (!playing) at("status").textContent = words; // spoken; not thirty times a second
  }

  // -- the clock: the dense video's; the others follow it

  function seek(to) {
    frame = Math.min(last, Math.max(0, to));
    videos.forEach((video) => (video.currentTime = (frame + 0.5) / data.fps)); // the middle of the frame
    mark();
  }

  function pause() {
    playing = false;
    videos.forEach((video) => video.pause());
    play.textContent = "Play";
    play.setAttribute("aria-label", "Play");
  }

  function stop() {
    pause();
    seek(Math.min(last, Math.floor(dense.currentTime * data.fps)));
  }

  async function start() {
    if (frame >= last) seek(0);
    playing = true;
    play.textContent = "Stop";
    play.setAttribute("aria-label", "Stop");
    try {
      await Promise.all(videos.map((video) => video.play()));
      requestAnimationFrame(follow);
    } catch (error) {
      if (playing) pause();
    }
  }

  function follow() {
    if (!playing) return;
    frame = Math.min(last, Math.floor(dense.currentTime * data.fps));
    mark();
    for (const video of followers) {
      const late = Math.abs(video.currentTime - dense.currentTime) * data.fps;
      if (late > 0.6 && !video.seeking) video.currentTime = dense.currentTime;
    }
    requestAnimationFrame(follow);
  }

  function step(by) {
    if (playing) stop();
    seek(frame + by);
  }

  dense.addEventListener("ended", () => {
    if (!playing) return;
    seek(0);
    videos.forEach((video) => video.play().catch(() => {}));
  });
  followers.forEach((video) => video.addEventListener("loadedmetadata", () => (video.currentTime = (frame + 0.5) / data.fps)));
  dense.addEventListener("loadedmetadata", () => (dense.currentTime = (frame + 0.5) / data.fps));

  // -- PSNR of the clip's frames

  const drawing = "http://www.w3.org/2000/svg", size = { width: 720, height: 170, left: 46, right: 8, top: 10, bottom: 22 };
  const place = (index) => size.left + (last ? index / last : 0.5) * (size.width - size.left - size.right);

  function make(name, attributes, text) {
    const element = document.createElementNS(drawing, name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function drawChart() {
    const lines = data.settings.map((name) => clip().settings[name].frames);
    const known = lines.flat().filter((value) => value !== null);
    const chart = at("chart");
    chart.replaceChildren();
    size.width = Math.max(200, chart.clientWidth);
    if (!known.length) return;
    const low = Math.floor(Math.min(...known)), high = Math.max(Math.ceil(Math.max(...known)), low + 1);
    const level = (value) => size.top + ((high - value) / (high - low)) * (size.height - size.top - size.bottom);
    const label = `PSNR of the frames of ${clip().name}, ${low} to ${high} dB, a line a setting; ${setting()} is the thick one`;
    const svg = make("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": label });
    for (const value of [low, (low + high) / 2, high]) {
      svg.append(make("line", { class: "axis", x1: size.left, x2: size.width, y1: level(value), y2: level(value) }));
      svg.append(make("text", { x: 2, y: level(value) + 4 }, `${value} dB`));
    }
    lines.forEach((values, number) => {
      const points = values.flatMap((value, i) => (value === null ? [] : [`${place(i)},${level(value)}`]));
      const chosen = data.settings[number] === setting() ? "chosen " : "";
      svg.append(make("polyline", { class: `${chosen}c${number % data.colours.length}`, points: points.join(" ") }));
    });
    svg.append(make("line", { class: "cursor", x1: place(frame), x2: place(frame), y1: 0, y2: size.height - size.bottom }));
    svg.append(make("text", { x: size.left, y: size.height - 6 }, "frame 1"));
    svg.append(make("text", { x: size.width - size.right, y: size.height - 6, "text-anchor": "end" }, `frame ${data.frames}`));
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * size.width;
      if (playing) stop();
      seek(Math.round(((x - size.left) / (size.width - size.left - size.right)) * last));
    });
    chart.append(svg);
  }

  window.addEventListener("resize", drawChart);

  // -- hands and keys

  at("clip").addEventListener("change", load);
  at("setting").addEventListener("change", load);
  at("speed").addEventListener("change", () => videos.forEach((video) => (video.playbackRate = Number(at("speed").value))));
  views.forEach((radio) => radio.addEventListener("change", () => show(radio.value)));
  wipe.addEventListener("input", () => setWipe(Number(wipe.value)));
  slider.addEventListener("input", () => {
    if (playing) pause();
    seek(Number(slider.value));
  });
  play.addEventListener("click", () => (playing ? stop() : start()));
  at("first").addEventListener("click", () => step(-data.frames));
  at("back").addEventListener("click", () => step(-1));
  at("forward").addEventListener("click", () => step(1));

  function drag(event) {
    if (stage.dataset.view !== "wipe" || !(event.buttons & 1)) return;
    const box = dense.getBoundingClientRect();
    setWipe(Math.round(((event.clientX - box.left) / box.width) * 100));
  }
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);

  const keys = {
    " ": () => (playing ? stop() : start()),
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ",": () => step(-1),
    ".": () => step(1),
    Home: () => step(-data.frames),
    End: () => step(data.frames),
    v: () => show(views[(views.findIndex((radio) => radio.checked) + 1) % views.length].value),
    "[": () => setWipe(Number(wipe.value) - 5),
    "]": () => setWipe(Number(wipe.value) + 5),
  };
  player.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    // Sliders, lists and buttons keep the keys that are theirs.
    if (event.target.matches("select, input, summary")) return;
    if (event.target.matches("button") && event.key === " ") return;
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    if (act) {
      event.preventDefault();
      act();
    }
  });

  // -- level masks: one setting and one step at a time

  const groups = [...document.querySelectorAll(".group")];
  function showMasks(keepStep) {
    const chosen = Number(at("mask-setting").value), group = groups[chosen];
    groups.forEach((other) => (other.hidden = other !== group));
    if (!keepStep) {
      const steps = group.dataset.steps.split(",");
      at("mask-step").replaceChildren(...steps.map((name) => new Option(name, name)));
    }
    group.querySelectorAll("figure").forEach((figure) => (figure.hidden = figure.dataset.step !== at("mask-step").value));
  }
  if (groups.length) {
    at("mask-setting").addEventListener("change", () => showMasks(false));
    at("mask-step").addEventListener("change", () => showMasks(true));
    showMasks(false);
  }

  videos.forEach((video) => (video.controls = false)); // there without this script
  setWipe(50);
  load();
})();
