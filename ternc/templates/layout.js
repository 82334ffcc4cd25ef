// Graph nodes -> a tree of modules -> positions: one layered drawing for each open module.
//
// An edge that crosses the border of an open module ends in a port on the border, which is a node
// of the drawings on both sides. An edge over several ranks passes through joints, which edges of
// the same source share. Positions within a rank: barycentres, then the nearest places that keep
// the distances (pool adjacent violators).

const PLAIN = new Set(["other", "input", "output", "weight"]);
const CHARACTER = 6.7, ROW = 18, GAP = 14, LINE_GAP = 5, RANK_GAP = 22, PADDING = 12, TITLE = 22;

/** Nodes in execution order -> root module {key, label, children: modules and leaves}. */
function moduleTree(nodes, withWeights) {
  const root = { key: "", label: "", children: [], order: -1 };
  const orders = weightOrders(nodes);
  const several = nodes.some((node) => node.name.includes(":"));
  const modules = new Map([["", root]]);
  const open = (key, label, parent) => {
    if (!modules.has(key)) {
      const made = { key, label, parent, order: Infinity, children: [] };
      modules.set(key, made);
      parent.children.push(made);
    }
    return modules.get(key);
  };
  nodes.forEach((node, index) => {
    if (node.kind === "weight" && !withWeights) return;
    const graph = several ? `graph ${node.name.includes(":") ? +node.name.split(":")[0] + 1 : 1}` : "";
    let parent = graph ? open(graph, graph, root) : root;
    for (const part of node.layer ? node.layer.split(".") : []) {
      parent = open(parent.key ? `${parent.key}.${part}` : part, part, parent);
    }
    const order = node.kind === "weight" ? orders[index] : index;
    parent.children.push({ node, index, order, parent, caption: "", children: null });
    for (let group = parent; group; group = group.parent) group.order = Math.min(group.order, order);
  });
  dissolve(root);
  return root;
}

/** Weights are all there before the first operation; each is placed just before its first user. */
function weightOrders(nodes) {
  const orders = nodes.map((_, index) => index);
  for (let user = nodes.length - 1; user >= 0; user--) {
    for (const input of nodes[user].inputs) orders[input] = user - 1 + (input + 1) / (nodes.length + 1);
  }
  return orders;
}

/** A module of one thing becomes that thing; lists of numbered modules give them their label. */
function dissolve(group) {
  const children = [];
  for (const child of group.children) {
    if (!child.children) { children.push(child); continue; }
    dissolve(child);
    const single = child.children.length === 1;
    const numbered = child.children.every((c) => c.children && /^\d/.test(c.label));
    if (!single && !numbered) { children.push(child); continue; }
    for (const inner of child.children) {
      if (inner.children) inner.label = `${child.label}.${inner.label}`;
      else inner.caption = inner.caption ? `${child.label}.${inner.caption}` : child.label;
      inner.parent = group;
      children.push(inner);
    }
  }
  group.children = children.sort((a, b) => a.order - b.order);
}

function leavesOf(item) {
  return item.children ? item.children.flatMap(leavesOf) : [item];
}

/** Keys of modules to open at first, outermost first: those at the top if they are not too large,
 *  then while few boxes are shown. Modules of nothing but plain operations stay closed. */
function firstOpen(root) {
  const keys = new Set();
  let shown = root.children.length, limit = 24;
  const queue = [...root.children];
  const plain = (item) => leavesOf(item).every((leaf) => PLAIN.has(leaf.node.kind));
  while (queue.length) {
    const item = queue.shift();
    if (!item.children || plain(item)) continue;
    const more = shown + item.children.length - 1;
    if (item.parent === root && more <= 80) limit = Math.max(limit, more + 12);
    if (more > limit) continue;
    keys.add(item.key);
    shown += item.children.length - 1;
    queue.push(...item.children);
  }
  return keys;
}

/** Sizes and positions of everything visible; returns {items, links, width, height}. */
function layoutTree(root, opened, nodes) {
  const visible = new Map(); // index of a node -> the box that shows it
  const place = (group) => {
    group.edges = new Map();
    for (const item of group.children) {
      item.open = Boolean(item.children) && opened.has(item.key);
      if (item.open) { place(item); continue; }
      for (const leaf of leavesOf(item)) visible.set(leaf.index, item);
    }
  };
  place(root);
  const drawn = new Set();
  for (const [index, target] of visible) {
    for (const input of nodes[index].inputs) {
      const source = visible.get(input);
      const pair = source && `${source.order} ${target.order}`;
      if (!source || source === target || drawn.has(pair)) continue;
      drawn.add(pair);
      connect(source, target);
    }
  }
  const size = layoutGroup(root);
  const result = { items: [], links: [], width: size.width, height: size.height };
  collect(root, 0, 0, result);
  return result;
}

/** Adds the parts of one edge to the drawing of every open module it passes through. */
function connect(source, target) {
  const up = [], down = [];
  for (let g = source.parent; g; g = g.parent) up.push(g);
  for (let g = target.parent; g && !up.includes(g); g = g.parent) down.unshift(g);
  const common = down.length ? down[0].parent : target.parent;
  let from = { item: source, port: null };
  for (const group of up.slice(0, up.indexOf(common))) {
    const port = `out ${source.order}`;
    addEdge(group, from, { item: null, port }, target);
    from = { item: group, port };
  }
  const entry = `in ${source.order}`;
  const ends = [...down.map((group) => ({ item: group, port: entry })), { item: target, port: null }];
  addEdge(common, from, ends[0], target);
  down.forEach((group, i) => addEdge(group, { item: null, port: entry }, ends[i + 1], target));
}

function addEdge(group, from, to, target) {
  const name = (end) => `${end.item ? end.item.order : "border"} ${end.port || ""}`;
  const key = `${name(from)} > ${name(to)}`;
  if (!group.edges.has(key)) group.edges.set(key, { from, to, targets: new Set() });
  group.edges.get(key).targets.add(target);
}

/** Positions of the children of one open module, relative to its corner; returns its size. */
function layoutGroup(group) {
  const cells = new Map(); // an item, or the name of a port -> its place in this drawing
  for (const item of group.children) {
    const size = item.open ? layoutGroup(item) : boxSize(item);
    cells.set(item, { item, ...size, x: 0, y: 0, rank: 1, above: [], below: [], order: item.order });
  }
  const edges = [...group.edges.values()].map((edge) => ({
    ...edge, a: cellOf(edge.from, cells), b: cellOf(edge.to, cells),
  }));
  for (const edge of edges) edge.back = edge.a.order >= edge.b.order;
  const last = assignRanks(cells, edges.filter((edge) => !edge.back));
  const ranks = Array.from({ length: last + 1 }, () => []);
  for (const cell of cells.values()) ranks[cell.rank].push(cell);
  group.steps = joinRanks(edges, ranks);
  placeRanks(ranks);
  return finish(group, cells, ranks);
}

function cellOf(end, cells) {
  if (end.item) return cells.get(end.item);
  if (!cells.has(end.port)) {
    const order = end.port.startsWith("in") ? -1 : Infinity;
    const cell = { port: end.port, width: 6, height: 0, x: 0, y: 0, rank: 0, above: [], below: [], order };
    cells.set(end.port, cell);
  }
  return cells.get(end.port);
}

/** Rank = longest path from the top; what nothing feeds moves down to just above its user. */
function assignRanks(cells, edges) {
  const sorted = [...cells.values()].sort((a, b) => a.order - b.order);
  const after = new Map(sorted.map((cell) => [cell, []]));
  const fed = new Set();
  for (const edge of edges) {
    after.get(edge.a).push(edge.b);
    fed.add(edge.b);
  }
  for (const cell of sorted) {
    for (const next of after.get(cell)) next.rank = Math.max(next.rank, cell.rank + 1);
  }
  for (const cell of sorted.reverse()) {
    const users = after.get(cell);
    if (cell.item && !fed.has(cell) && users.length) {
      cell.rank = Math.max(1, Math.min(...users.map((user) => user.rank)) - 1);
    }
  }
  const last = Math.max(1, ...sorted.map((cell) => cell.rank));
  for (const cell of sorted) if (cell.order === Infinity) cell.rank = Math.max(cell.rank, last);
  return Math.max(last, ...sorted.map((cell) => cell.rank));
}

/** Edges -> steps from one rank to the next, through joints shared by edges of one source. */
function joinRanks(edges, ranks) {
  const steps = new Map(), joints = new Map();
  const step = (a, aPort, b, bPort, edge) => {
    const key = [ranks[a.rank].indexOf(a), a.rank, aPort, ranks[b.rank].indexOf(b), b.rank, bPort].join(" ");
    if (!steps.has(key)) {
      const made = { a, aPort, b, bPort, back: edge.back, ends: new Set() };
      steps.set(key, made);
      if (!edge.back) { a.below.push(made); b.above.push(made); }
    }
    for (const target of edge.targets) steps.get(key).ends.add(target);
    steps.get(key).ends.add(sourceOf(edge.from));
  };
  for (const edge of edges) {
    let at = edge.a, port = edge.from.item && edge.from.port;
    for (let rank = edge.a.rank + 1; !edge.back && rank < edge.b.rank; rank++) {
      const key = `${edge.a.order} ${edge.a.port || ""} ${edge.from.port || ""} ${rank}`;
      if (!joints.has(key)) {
        const joint = { width: 2, height: 0, x: 0, y: 0, rank, above: [], below: [] };
        joints.set(key, joint);
        ranks[rank].push(joint);
      }
      step(at, port, joints.get(key), null, edge);
      [at, port] = [joints.get(key), null];
    }
    step(at, port, edge.b, edge.to.item && edge.to.port, edge);
  }
  return [...steps.values()];
}

/** The order of the box an edge comes from; ports are named after it. */
function sourceOf(end) {
  return end.port ? +end.port.split(" ")[1] : end.item.order;
}

/** x of the point where an edge meets a cell. */
function meets(cell, port) {
  return cell.x + (port ? cell.ports.get(port) : cell.width / 2);
}

function placeRanks(ranks) {
  for (const rank of ranks) spread(rank, rank.map((_, i) => i * 40));
  for (let sweep = 0; sweep < 14; sweep++) {
    const both = sweep >= 10;
    const ordered = sweep % 2 ? [...ranks].reverse() : ranks;
    for (const rank of ordered) {
      const wanted = rank.map((cell) => {
        const above = cell.above.map((s) => [meets(s.a, s.aPort), s.bPort]);
        const below = cell.below.map((s) => [meets(s.b, s.bPort), s.aPort]);
        const used = both ? [...above, ...below] : sweep % 2 ? below : above;
        const known = used.length ? used : [...above, ...below];
        if (!known.length) return null;
        const offset = (port) => (port ? cell.ports.get(port) - cell.width / 2 : 0);
        return known.reduce((sum, [x, port]) => sum + x - offset(port), 0) / known.length;
      });
      settleLoose(wanted);
      const order = rank.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
      const cells = order.map((i) => rank[i]);
      rank.splice(0, rank.length, ...cells);
      spread(rank, order.map((i) => wanted[i]));
    }
  }
}

/** What is tied to nothing goes to the middle of its rank. */
function settleLoose(wanted) {
  const known = wanted.filter((x) => x !== null);
  const middle = known.reduce((sum, x) => sum + x, 0) / (known.length || 1);
  wanted.forEach((x, i) => { if (x === null) wanted[i] = middle; });
}

/** Centres as near to the wanted ones as the widths allow (least squares, order kept). */
function spread(rank, wanted) {
  const pools = [];
  let offset = 0;
  rank.forEach((cell, i) => {
    const half = cell.width / 2;
    const line = (other) => other.height === 0;
    const gap = i && line(cell) && line(rank[i - 1]) ? LINE_GAP : GAP;
    offset += i ? rank[i - 1].width / 2 + gap + half : 0;
    let pool = { sum: wanted[i] - offset, count: 1 };
    while (pools.length && pools[pools.length - 1].sum / pools[pools.length - 1].count > pool.sum / pool.count) {
      const previous = pools.pop();
      pool = { sum: pool.sum + previous.sum, count: pool.count + previous.count };
    }
    pools.push(pool);
    cell.offset = offset;
  });
  let i = 0;
  for (const pool of pools) {
    for (let n = 0; n < pool.count; n++, i++) {
      rank[i].x = pool.sum / pool.count + rank[i].offset - rank[i].width / 2;
    }
  }
}

/** Ranks -> heights; the corner of the module to (0, 0); where its ports are. */
function finish(group, cells, ranks) {
  const everything = ranks.flat();
  const left = Math.min(...everything.map((cell) => cell.x), 0) - PADDING;
  let y = group.parent ? TITLE : PADDING;
  const minimum = group.parent ? group.label.length * CHARACTER + 50 : 0;
  ranks.forEach((rank, index) => {
    const height = Math.max(0, ...rank.map((cell) => cell.height));
    const drawn = rank.length > 0 && !(index === 0 && height === 0);
    for (const cell of rank) {
      cell.y = index === 0 ? 0 : y + (height - cell.height) / 2;
      [cell.top, cell.bottom] = [index === 0 ? 0 : y, index === 0 ? 0 : y + height];
    }
    if (drawn) y += height + RANK_GAP;
  });
  const height = y - RANK_GAP + PADDING;
  group.ports = new Map();
  for (const cell of everything) {
    cell.x -= left;
    if (!cell.port) continue;
    group.ports.set(cell.port, cell.x + cell.width / 2);
    if (cell.port.startsWith("out")) cell.y = cell.top = cell.bottom = height;
  }
  group.cells = cells;
  const right = Math.max(...everything.map((cell) => cell.x + cell.width), 0) + PADDING;
  return { width: Math.max(right, minimum), height, ports: group.ports };
}

function boxSize(item) {
  const lines = linesOf(item);
  const longest = Math.max(...lines.map((line, i) => line.length * (i ? 0.87 : 1)));
  return { width: Math.ceil(longest * CHARACTER) + 20, height: ROW * lines.length + (item.children ? 10 : 6) };
}

function linesOf(item) {
  if (!item.children) return item.caption ? [item.node.label, item.caption] : [item.node.label];
  const count = leavesOf(item).length;
  return [`+ ${item.label}`, `${count} operation${count > 1 ? "s" : ""}`];
}

/** Positions relative to a module -> positions in the drawing, as flat lists. */
function collect(group, x, y, result) {
  for (const cell of group.cells.values()) {
    if (!cell.item) continue;
    const { width, height } = cell;
    result.items.push({ item: cell.item, x: x + cell.x, y: y + cell.y, width, height });
    if (cell.item.open) collect(cell.item, x + cell.x, y + cell.y, result);
  }
  for (const step of group.steps) {
    const [x1, x2] = [x + meets(step.a, step.aPort), x + meets(step.b, step.bPort)];
    const from = y + step.a.y + step.a.height, to = y + step.b.y;
    result.links.push({ x1, y1: from, x2, y2: to, low: y + step.a.bottom, high: y + step.b.top, step });
  }
}
