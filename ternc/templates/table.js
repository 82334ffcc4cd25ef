"use strict";
// The table of layers: sort, find, filter; the read limit for a given bandwidth.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function sortTable(table, column, heading) {
  const next = { ascending: "descending", descending: "ascending" };
  const direction = next[heading.getAttribute("aria-sort")] || heading.dataset.first;
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // nothing known: last either way
    const numeric = x - y;
    return sign * (Number.isNaN(numeric) ? x.localeCompare(y, "en", { numeric: true }) : numeric);
  });
  table.tBodies[0].append(...rows);
}

function filterTable(table) {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const action = byId("show").value;
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    const fits = words.every((word) => text.includes(word));
    row.hidden = !(fits && (!action || row.dataset.action === action));
    shown += !row.hidden;
  }
  byId("shown").textContent = `${shown} of ${table.tBodies[0].rows.length} shown`;
}

function showRow(number) {
  byId("find").value = byId("show").value = "";
  filterTable(byId("rows"));
  const row = byId(`row-${number}`);
  for (const other of document.querySelectorAll("tr.chosen")) other.classList.remove("chosen");
  row.classList.add("chosen");
  row.querySelector("details").open = true;
  row.scrollIntoView({ block: "center" });
}

function writeLimits(bytesPerSecond) {
  for (const cell of document.querySelectorAll("td.limit")) {
    if (cell.dataset.value === "") continue;
    const us = (cell.dataset.value / bytesPerSecond) * 1e6;
    const text = us >= 1e3 ? `${(us / 1e3).toFixed(2)} ms` : `${us.toFixed(2)} us`;
    cell.textContent = bytesPerSecond > 0 ? text : "unknown";
  }
}

if (byId("rows")) {
  const table = byId("rows");
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    heading.firstChild.addEventListener("click", () => sortTable(table, column, heading));
  });
  for (const input of ["find", "show"]) {
    byId(input).addEventListener("input", () => filterTable(table));
  }
  filterTable(table);
  for (const target of document.querySelectorAll(".hit")) {
    target.addEventListener("click", () => showRow(target.dataset.row));
  }
}
if (byId("bandwidth")) {
  const input = byId("bandwidth");
  if (DATA.bandwidth) input.value = DATA.bandwidth / 1e9;
  input.addEventListener("input", () => writeLimits(1e9 * input.value));
  writeLimits(1e9 * input.value);
}
