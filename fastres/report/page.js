"use strict";

// Theme: what the system prefers, until the button says otherwise.
const root = document.documentElement;
const toggle = document.getElementById("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
  toggle.setAttribute("aria-pressed", String(dark));
  return dark;
}

toggle.addEventListener("click", () => {
  root.dataset.theme = showTheme() ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

// Tables: a heading sorts by its column, and the other way round at the next click.
function keyOf(row, column) {
  const cell = row.cells[column];
  const numeric = cell.closest("table").tHead.rows[0].cells[column].classList.contains("number");
  if (!numeric) return cell.textContent;
  return "value" in cell.dataset ? Number(cell.dataset.value) : null;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

function sortBy(heading) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  const body = heading.closest("table").tBodies[0];
  const keyed = [...body.rows].map((row) => [keyOf(row, heading.cellIndex), row]);
  const known = keyed.filter(([key]) => key !== null);
  const unknown = keyed.filter(([key]) => key === null); // last in both directions
  known.sort(([a], [b]) => (descending ? compare(b, a) : compare(a, b)));
  body.append(...known.concat(unknown).map(([, row]) => row));
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
