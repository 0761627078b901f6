
// Shows one row of a table of scores at a time as the colours of the text above it.
for (const root of document.querySelectorAll(".captum-ssm.views:not([data-ready])")) {
  root.dataset.ready = "";
  const pieces = [...root.querySelectorAll(".text span")];
  const rows = [...root.querySelectorAll("tbody tr")];
  const names = [...root.querySelectorAll("thead bdi")].map((header) => header.textContent);
  const legend = root.querySelector(".legend");
  const status = root.querySelector(".status");
  const value = (cell) => parseFloat(cell.textContent.replaceAll("\u2212", "-"));
  const rounded = (number, digits) => Number(Math.abs(number).toPrecision(digits)).toString().replace("-", "\u2212");
  const signed = (number) => (number < 0 ? "\u2212" : "+") + rounded(number, 3);
  const add = (parent, tag, text) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));
  const choices = []; // one element for each row
  let kept = 0;

  function spellOut(row, cells) {
    const sources = cells.map((cell, j) => [value(cell), j]).filter(([score]) => !Number.isNaN(score));
    sources.sort(([a], [b]) => Math.abs(b) - Math.abs(a));
    const sum = (some) => signed(some.reduce((total, [score]) => total + score, 0));
    const strongest = sources.slice(0, 8), others = sources.slice(8);
    status.replaceChildren();
    add(status, "b", "").append(row.querySelector("bdi").cloneNode(true));
    status.append(": ");
    strongest.forEach(([score, j], k) => {
      add(status, "bdi", `\u2018${names[j]}\u2019`);
      if (names.indexOf(names[j]) !== names.lastIndexOf(names[j])) status.append(` (token ${j + 1})`);
      status.append(` ${signed(score)}${k + 1 < strongest.length ? ", " : ""}`);
    });
    if (others.length) status.append(`; ${others.length} other ${others.length > 1 ? "tokens" : "token"} ${sum(others)}`);
    status.append(`; sum ${sum(sources)}`);
  }

  function show(number) {
    const cells = [...rows[number].querySelectorAll("td")];
    pieces.forEach((piece, j) => {
      piece.classList.remove(...[...piece.classList].filter((name) => /^l-?\d+$/.test(name)));
      if (cells[j].className) piece.classList.add(cells[j].className);
      piece.title = cells[j].textContent;
    });
    const scores = cells.map(value).filter((score) => !Number.isNaN(score));
    const top = rounded(Math.max(0, ...scores.map(Math.abs)), 2), negative = scores.some((score) => score < 0);
    legend.replaceChildren();
    for (const [sign, text] of [[-20, `\u2212${top}`], [0, "0"], [20, `+${top}`]]) {
      if (sign >= 0 || negative) add(legend, "span", ` ${text} `).className = `l${sign}`;
    }
    spellOut(rows[number], cells);
    choices.forEach((choice, k) => choice.classList.toggle("shown", k === number));
    rows.forEach((row, k) => row.classList.toggle("current", k === number));
  }

  function keep(number) {
    kept = number;
    choices.forEach((choice, k) => choice.setAttribute("aria-pressed", k === kept));
    show(kept);
  }

  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Views");
  root.querySelector(".text").before(bar);
  rows.forEach((row, k) => {
    const piece = pieces[row.dataset.token];
    const choice = piece ?? add(bar, "button", row.querySelector("bdi").textContent);
    choices.push(choice);
    if (piece) {
      piece.classList.add("view");
      piece.tabIndex = 0;
      piece.setAttribute("role", "button");
    } else choice.type = "button";
    choice.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(k));
    choice.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(kept));
    choice.addEventListener("focus", () => show(k));
    choice.addEventListener("blur", () => show(kept));
    choice.addEventListener("click", () => keep(kept === k ? 0 : k));
    choice.addEventListener("keydown", (event) => {
      const others = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: rows.length - 1 };
      if (piece && (event.key === "Enter" || event.key === " ")) keep(kept === k ? 0 : k);
      else if (event.key === "Escape") keep(0);
      else if (event.key in others) choices[others[event.key]]?.focus();
      else return;
      event.preventDefault();
    });
  });
  if (pieces.some((piece) => piece.tabIndex === 0)) {
    add(bar, "small", "Point at, tap or tab to an underlined token to see where it comes from.");
  }
  if (root.parentElement === document.body) {
    const theme = add(bar, "button", "Light or dark");
    theme.type = "button";
    theme.addEventListener("click", () => {
      const dark = getComputedStyle(root).colorScheme === "dark" || (document.documentElement.dataset.theme === undefined
        && matchMedia("(prefers-color-scheme: dark)").matches);
      document.documentElement.dataset.theme = dark ? "light" : "dark";
    });
  }
  keep(0);
}
