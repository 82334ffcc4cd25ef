// Draws both graphs, opens and closes modules in both at once, moves and zooms each.

const SVG = "http://www.w3.org/2000/svg";
const LEGIBLE = 0.75; // the least scale at which a label can be read
const opened = new Set();
const views = [];

function make(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function element(name, parent, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

/** Kinds of the operations in a closed module, most frequent first: [kind, count]. */
function kindsIn(item) {
  const counts = new Map();
  for (const leaf of leavesOf(item)) {
    counts.set(leaf.node.kind, (counts.get(leaf.node.kind) || 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]);
}

class GraphView {
  constructor(host, nodes) {
    this.host = host;
    this.nodes = nodes;
    this.svg = make("svg", { class: "canvas", tabindex: 0, role: "img" }, host);
    this.svg.setAttribute("aria-label", `graph ${host.id} rewriting`);
    this.detail = element("div", host);
    this.detail.className = "detail";
    this.chosen = null;
    this.listen();
    this.build(false);
  }

  build(withWeights) {
    this.root = moduleTree(this.nodes, withWeights);
  }

  draw() {
    const { items, links, width, height } = layoutTree(this.root, opened, this.nodes);
    [this.width, this.height] = [width, height];
    this.svg.replaceChildren();
    this.byOrder = new Map();
    this.places = new Map(items.map((placed) => [placed.item.key, placed]));
    this.first = items.reduce((top, placed) => (placed.y < top.y ? placed : top), items[0]);
    const frames = make("g", {}, this.svg);
    const edges = make("g", {}, this.svg);
    const boxes = make("g", {}, this.svg);
    for (const placed of items) {
      if (placed.item.open) this.drawFrame(frames, placed);
      else this.drawBox(boxes, placed);
    }
    this.links = links.map((link) => this.drawLink(edges, link));
    this.describe(null);
  }

  drawFrame(parent, { item, x, y, width, height }) {
    const group = make("g", { transform: `translate(${x} ${y})` }, parent);
    make("rect", { class: "frame", width, height, rx: 5 }, group);
    const title = make("rect", { class: "title", width, height: TITLE, rx: 5 }, group);
    make("title", {}, title, `${item.key}: close`);
    make("text", { x: 8, y: 15 }, group, `\u2212 ${item.label}`);
    this.activate(title, `close ${item.key}`, () => toggle(item.key));
  }

  drawBox(parent, { item, x, y, width, height }) {
    const closed = Boolean(item.children);
    const kind = closed ? "group" : `${item.node.kind}`;
    const group = make("g", { class: `item ${kind}`, transform: `translate(${x} ${y})` }, parent);
    const box = make("rect", { class: "box", width, height, rx: 4 }, group);
    linesOf(item).forEach((line, i) => {
      make("text", { x: 10, y: 15 + i * 15, class: i ? "small" : "" }, group, line);
    });
    if (closed) this.drawMix(group, item, width, height);
    else if (!PLAIN.has(item.node.kind)) {
      group.classList.add("tinted");
      box.style.fill = box.style.stroke = `var(--${item.node.kind})`;
    }
    make("title", {}, group, closed ? item.key : `${item.node.target}\n${item.node.value}`);
    this.activate(group, closed ? `open ${item.key}` : item.node.name, () => {
      if (closed) toggle(item.key);
      else this.choose(item);
    });
    this.byOrder.set(item.order, group);
  }

  /** What a closed module holds: a strip with a length of each colour. */
  drawMix(group, item, width, height) {
    const kinds = kindsIn(item);
    const total = kinds.reduce((sum, [, count]) => sum + count, 0);
    let x = 6;
    for (const [kind, count] of kinds) {
      const length = ((width - 12) * count) / total;
      const part = make("rect", { x, y: height - 8, width: length, height: 4 }, group);
      part.style.fill = `var(--${kind})`;
      x += length;
    }
  }

  drawLink(parent, { x1, y1, x2, y2, low, high, step }) {
    const bend = Math.max(6, Math.abs(high - low) * 0.5);
    const path = step.back
      ? `M${x1} ${y1}C${x1} ${y1 + 30} ${x2} ${y2 - 30} ${x2} ${y2}`
      : `M${x1} ${y1}L${x1} ${low}C${x1} ${low + bend} ${x2} ${high - bend} ${x2} ${high}L${x2} ${y2}`;
    const drawn = make("path", { d: path, class: step.back ? "back" : "" }, parent);
    const ends = new Set([...step.ends].map((end) => (typeof end === "number" ? end : end.order)));
    return { drawn, ends, step };
  }

  activate(target, label, action) {
    target.setAttribute("tabindex", 0);
    target.setAttribute("role", "button");
    target.setAttribute("aria-label", label);
    target.addEventListener("click", () => this.moved || action());
    target.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action(); }
    });
  }

  choose(item) {
    for (const box of this.byOrder.values()) box.classList.remove("chosen");
    this.byOrder.get(item.order).classList.add("chosen");
    for (const { drawn, ends } of this.links) drawn.classList.toggle("on", ends.has(item.order));
    this.describe(item);
  }

  describe(item) {
    this.detail.replaceChildren();
    if (!item) {
      const weights = this.nodes.filter((node) => node.kind === "weight").length;
      const text = `${this.nodes.length - weights} operations, ${weights} weights. Click one to read it.`;
      element("p", this.detail, text).className = "hint";
      return;
    }
    const names = (indices) => indices.map((index) => this.nodes[index].name).join(", ") || "none";
    const users = this.nodes.flatMap((node, i) => (node.inputs.includes(item.index) ? [i] : []));
    const list = element("dl", this.detail);
    const facts = {
      operation: item.node.target, node: item.node.name, layer: item.node.layer || "whole model",
      gives: item.node.value || "unknown", reads: names(item.node.inputs), "read by": names(users),
    };
    for (const [term, text] of Object.entries(facts)) {
      element("dt", list, term);
      element("code", element("dd", list), text);
    }
  }

  /** The whole graph. */
  fit() {
    const { clientWidth: w, clientHeight: h } = this.svg;
    const scale = Math.min(1.2, w / (this.width + 20), h / (this.height + 20));
    this.show((this.width - w / scale) / 2, (this.height - h / scale) / 2, scale);
  }

  /** The whole graph, or the beginning of it where the whole would be too small to read. */
  home() {
    this.fit();
    if (this.scale >= LEGIBLE || !this.first) return;
    const room = this.svg.clientWidth / LEGIBLE;
    const left = this.first.x + this.first.width / 2 - room / 2;
    const inside = Math.max(-10, Math.min(left, this.width + 10 - room));
    this.show(this.width < room ? (this.width - room) / 2 : inside, -10, LEGIBLE);
  }

  /** Draws anew; what is now at a module's corner stays where it is on the screen. */
  redrawAround(key) {
    const before = this.places.get(key);
    this.draw();
    const after = this.places.get(key);
    if (before && after) this.show(this.x + after.x - before.x, this.y + after.y - before.y, this.scale);
  }

  show(x, y, scale) {
    Object.assign(this, { x, y, scale });
    const { clientWidth: w, clientHeight: h } = this.svg;
    this.svg.setAttribute("viewBox", `${x} ${y} ${w / scale} ${h / scale}`);
  }

  /** Zooms about a point of the canvas, in pixels. */
  zoom(factor, px, py) {
    const scale = Math.min(4, Math.max(0.03, this.scale * factor));
    const keep = 1 / this.scale - 1 / scale;
    this.show(this.x + px * keep, this.y + py * keep, scale);
  }

  zoomCentre(factor) {
    this.zoom(factor, this.svg.clientWidth / 2, this.svg.clientHeight / 2);
  }

  listen() {
    const pointers = new Map();
    const distance = () => {
      const [a, b] = [...pointers.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (!pointers.size) this.moved = false;
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    });
    window.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const [dx, dy] = [event.clientX - before.x, event.clientY - before.y];
      if (!this.moved && Math.hypot(dx, dy) < 4) return;
      this.moved = true;
      const apart = pointers.size === 2 && distance();
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (apart) this.zoomCentre(distance() / apart);
      else this.show(this.x - dx / this.scale, this.y - dy / this.scale, this.scale);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      window.addEventListener(end, (event) => pointers.delete(event.pointerId));
    }
    this.svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !this.svg.contains(document.activeElement)) return;
      event.preventDefault();
      const corner = this.svg.getBoundingClientRect();
      const factor = Math.exp(-event.deltaY / 400);
      this.zoom(factor, event.clientX - corner.left, event.clientY - corner.top);
    }, { passive: false });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("dblclick", (event) => event.target === this.svg && this.fit());
    const actions = { in: () => this.zoomCentre(1.4), out: () => this.zoomCentre(1 / 1.4), fit: () => this.fit() };
    for (const button of this.host.querySelectorAll("[data-do]")) {
      button.addEventListener("click", actions[button.dataset.do]);
    }
  }

  key(event) {
    const step = 60 / this.scale;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      this.show(this.x + moves[event.key][0], this.y + moves[event.key][1], this.scale);
    } else if (event.key === "+" || event.key === "-") this.zoomCentre(event.key === "+" ? 1.4 : 1 / 1.4);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }
}

function redraw() {
  for (const view of views) {
    view.draw();
    view.home();
  }
}

function toggle(key) {
  if (!opened.delete(key)) opened.add(key);
  for (const view of views) view.redrawAround(key);
}

function allKeys(group) {
  return group.children.flatMap((child) => (child.children ? [child.key, ...allKeys(child)] : []));
}

function startGraphs() {
  for (const id of ["before", "after"]) {
    if (DATA[id].length) views.push(new GraphView(byId(id), DATA[id]));
    else element("p", byId(id), "No graph was traced.").className = "hint";
  }
  const present = new Set([...DATA.before, ...DATA.after].map((node) => node.kind));
  for (const [kind, name] of Object.entries(DATA.kinds)) {
    if (!present.has(kind) || (PLAIN.has(kind) && kind !== "other")) continue;
    const entry = element("span", byId("kinds"));
    element("b", entry, name);
    entry.style.color = `var(--${kind})`;
  }
  for (const view of views) for (const key of firstOpen(view.root)) opened.add(key);
  byId("open-all").addEventListener("click", () => {
    for (const view of views) for (const key of allKeys(view.root)) opened.add(key);
    redraw();
  });
  byId("close-all").addEventListener("click", () => { opened.clear(); redraw(); });
  byId("weights").addEventListener("change", (event) => {
    for (const view of views) {
      const known = new Set(allKeys(view.root));
      view.build(event.target.checked);
      // An operation that was drawn alone has become a module with its weights: show both.
      for (const key of allKeys(view.root)) if (!known.has(key)) opened.add(key);
    }
    redraw();
  });
  window.addEventListener("resize", () => {
    for (const view of views) view.show(view.x, view.y, view.scale);
  });
  redraw();
}

if (byId("graphs")) startGraphs();
