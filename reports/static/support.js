// The support table's filters, and the scripts of its rows' pages.
"use strict";

function startSupport(form) {
  const table = document.getElementById("support");
  const heads = Array.from(table.tHead.rows[0].querySelectorAll("[data-arch]"));
  const groups = Array.from(table.tBodies, (body) => ({
    body, rows: Array.from(body.querySelectorAll("[data-format]"), (row) => ({ row, cells: Array.from(row.querySelectorAll("td")) })),
  }));
  const total = groups.reduce((sum, group) => sum + group.rows.length, 0);

  function fits(cell, filters) {
    const changed = cell.dataset.changed || "";
    return (!filters.changed || (filters.changed === "any" ? changed !== "" : changed.split(" ").includes(filters.changed)))
      && (!filters.wrong || "wrong" in cell.dataset);
  }

  function apply(filters) {
    const columns = new Set(heads.filter(({ dataset }) => !filters.arch || [dataset.arch, dataset.vendor].includes(filters.arch))
      .map(({ dataset }) => dataset.arch));
    for (const cell of table.querySelectorAll("[data-arch]")) cell.hidden = !columns.has(cell.dataset.arch);
    const words = (filters.q || "").toLowerCase().split(/\s+/);
    let shown = 0;
    for (const { body, rows } of groups) {
      let any = false;
      for (const { row, cells } of rows) {
        let some = false;
        for (const cell of cells) {
          const fit = fits(cell, filters);
          cell.classList.toggle("dim", !fit);
          some ||= fit && !cell.hidden;
        }
        row.hidden = !some || (filters.operation && body.dataset.operation !== filters.operation)
          || !words.every((word) => row.dataset.format.toLowerCase().includes(word));
        any ||= !row.hidden;
        shown += !row.hidden;
      }
      body.hidden = !any;
    }
    document.getElementById("shown").textContent = shown === total && !Object.keys(filters).length
      ? `All ${total} rows. The address keeps the filters: share it.` : `${shown} of ${total} rows.`;
  }

  keepInAddress(form, apply, () => document.getElementById("table-title").scrollIntoView());
}

// A script is put together when somebody opens it: hundreds share their parts.
function startScript(details, { parts, scripts }) {
  const number = details.dataset.script;
  details.addEventListener("toggle", () => {
    const block = document.createElement("div"), button = document.createElement("button"), text = document.createElement("pre");
    text.id = `script-${number}`;
    text.textContent = scripts[number].map((at) => parts[at]).join("\n\n");
    button.className = "copy";
    button.dataset.copy = text.id;
    button.textContent = "copy";
    block.className = "code";
    block.append(button, text);
    details.append(block);
    startCopying(button);
  }, { once: true });
}

const supportForm = document.getElementById("support-filters"), scriptsData = document.getElementById("scripts");
if (supportForm) startSupport(supportForm);
if (scriptsData) {
  const data = JSON.parse(scriptsData.textContent);
  document.querySelectorAll("[data-script]").forEach((details) => startScript(details, data));
}
