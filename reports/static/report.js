// Filters that are kept in the address, so that they can be shared; those of a sweep's page; and copy buttons.
"use strict";

// Calls apply(filters) with the form's values that are not empty, now and whenever they change or the address does; `moved`
// after somebody followed a link to other filters. The address has them all.
function keepInAddress(form, apply, moved) {
  const wanted = () => Object.fromEntries(Array.from(new FormData(form)).filter(([, value]) => value));

  function fromAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const filters = Array.from(form.elements).filter((element) => element.name);
    if (location.hash && !filters.some((element) => asked.has(element.name))) return false;     // a link to a heading
    for (const element of filters) {
      const value = asked.get(element.name) || "";
      if (element.type === "checkbox") {
        element.checked = value === element.value;
        continue;
      }
      element.value = value;
      // A value that this page does not have shows as a choice, and selects nothing.
      if (element.tagName === "SELECT" && element.selectedIndex < 0) {
        element.add(new Option(value));
        element.value = value;
      }
    }
    apply(wanted());
    return location.hash !== "";
  }

  function toAddress() {
    const filters = wanted(), query = new URLSearchParams(filters).toString();
    apply(filters);
    history.replaceState(null, "", query ? "#" + query : location.pathname);
  }

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", toAddress);
  form.addEventListener("reset", () => setTimeout(toAddress));
  addEventListener("hashchange", () => {
    if (fromAddress()) moved();
  });
  if (!fromAddress()) apply(wanted());
}

const SLOW_BELOW = 0.95;    // as in sweep.py

function startFilters(form) {
  const rows = Array.from(document.querySelectorAll("#cases tbody tr"));
  const id = (row) => Array.from(row.cells).slice(1, 6).map((cell, index) => (index === 3 ? "m" : "") + cell.textContent).join("/");
  const texts = new Map(rows.map((row) => [row, (id(row) + " " + row.textContent).toLowerCase()]));
  const matrix = document.getElementById("matrix");
  const cells = new Map();
  for (const line of matrix.tBodies[0].rows)
    for (const cell of line.cells)
      if (cell.tagName === "TD" && cell.querySelector("a")) cells.set(line.dataset.implementation + " " + cell.dataset.scheme, cell);
  const original = new Map(Array.from(cells, ([key, cell]) => [key, { className: cell.className, nodes: Array.from(cell.childNodes) }]));
  // Worst first, as the server sorted them: each option of the status filter but the first three.
  const options = Array.from(form.elements.status.options).slice(3);
  const signs = new Map(options.map((option) => [option.value, option.textContent.split(" ")[0]]));
  const order = options.map((option) => option.value);

  function fits(row, filters) {
    const data = row.dataset;
    return ["implementation", "scheme", "workload"].every((name) => !filters[name] || data[name] === filters[name])
      && (!filters.status || data.status === filters.status
        || (filters.status === "broken" && "broken" in data) || (filters.status === "timed" && "speedup" in data))
      && (!filters.mark || data.marks.split(" ").includes(filters.mark))
      && (!filters.q || filters.q.toLowerCase().split(/\s+/).every((word) => texts.get(row).includes(word)));
  }

  function median(values) {
    const sorted = values.sort((a, b) => a - b), middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }

  function redraw(shown) {
    const groups = new Map();
    for (const row of shown) {
      const key = row.dataset.implementation + " " + row.dataset.scheme;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    for (const [key, cell] of cells) {
      const group = groups.get(key);
      if (!group) {
        cell.className = "none";
        cell.replaceChildren();
        continue;
      }
      cell.className = original.get(key).className;
      cell.replaceChildren(...original.get(key).nodes);
      if (shown.length === rows.length) continue;
      const worst = order.find((status) => group.some((row) => row.dataset.status === status));
      const speedups = group.filter((row) => "speedup" in row.dataset).map((row) => Number(row.dataset.speedup));
      const bad = group.filter((row) => row.dataset.status === worst).length;
      const link = cell.querySelector("a").cloneNode(false), sign = document.createElement("span"), speed = document.createElement("span");
      cell.className = "s-" + worst;
      link.title = `${key.replace(" ", ", ")}: ${bad} of ${group.length} ${worst}`;
      sign.className = "sign";
      sign.textContent = signs.get(worst);
      speed.className = "speed";
      if (speedups.length) {
        const value = median(speedups);
        speed.textContent = value.toPrecision(value < 0.995 ? 2 : 3) + "×";
        cell.classList.toggle("slow", worst === "ok" && value < SLOW_BELOW);
      } else if (bad < group.length) {
        speed.textContent = `${bad}/${group.length}`;
      }
      link.append(sign, speed);
      cell.replaceChildren(link);
    }
    const used = (name) => new Set(shown.map((row) => row.dataset[name]));
    const implementations = used("implementation"), schemes = used("scheme");
    for (const line of matrix.tBodies[0].rows) line.hidden = !implementations.has(line.dataset.implementation);
    for (const cell of matrix.querySelectorAll("[data-scheme]")) cell.hidden = !schemes.has(cell.dataset.scheme);
  }

  function apply(filters) {
    const shown = rows.filter((row) => {
      row.hidden = !fits(row, filters);
      return !row.hidden;
    });
    redraw(shown);
    document.getElementById("shown").textContent = shown.length === rows.length
      ? `All ${rows.length} cases. The address keeps the filters: share it.` : `${shown.length} of ${rows.length} cases.`;
  }

  keepInAddress(form, apply, () => document.getElementById("cases-title").scrollIntoView());
}

function startCopying(button) {
  const source = document.getElementById(button.dataset.copy), label = button.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {
      // Some browsers keep the clipboard from pages opened as files: leave the text selected.
      getSelection().selectAllChildren(source);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}

document.querySelectorAll("[data-copy]").forEach(startCopying);
const filtersForm = document.getElementById("filters");
if (filtersForm) startFilters(filtersForm);
