// Pictures of the last two minutes, one column a second, in the colours of the game day's report.

const SPAN = 120, HIGH = 84, WIDE = 600;
const COLUMN = WIDE / SPAN;

/** A panel: a title, a legend with the latest figures, and a plot of bars that stand on each other, or of lines. */
class Panel {
  constructor(title, series, {bars = false, unit, least}) {
    this.series = series;
    this.bars = bars;
    this.unit = unit;
    this.least = least;
    this.figures = series.map(() => make("b"));
    this.top = make("span", {class: "top"});
    this.svg = shape("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img"});
    this.title = title;
    this.paths = series.map(({colour}) => {
      const path = shape("path", {class: bars ? "bar" : "line"});
      path.style[bars ? "fill" : "stroke"] = `var(--${colour})`;
      this.svg.append(path);
      return path;
    });
    this.empty = make("p", {class: "empty"});
    this.element = make("section", {class: "panel"},
      make("div", {class: "panel-head"}, make("h2", {}, title), series.map(({name, colour}, place) => legend(name, colour, this.figures[place]))),
      make("div", {class: "plot"}, this.top, make("span", {class: "zero"}, "0"), this.svg, this.empty),
      make("div", {class: "ticks", "aria-hidden": "true"}, make("span", {}, "2 min ago"), make("span", {}, "1 min"), make("span", {}, "now")));
  }

  /** Draw columns, the latest last, and write figures; `values` and figures are in the order of the series, null where there is none. */
  draw(columns, figures) {
    const texts = figures.map((figure) => (figure === null ? NONE : this.unit(figure)));
    texts.forEach((text, place) => say(this.figures[place], text));
    const heights = columns.flatMap(({values}) => (this.bars ? [values.reduce((sum, value) => sum + (value ?? 0), 0)] : values.filter((value) => value !== null)));
    const highest = Math.max(this.least, ...heights);
    say(this.top, this.unit(highest));
    this.svg.setAttribute("aria-label", `${this.title}: ${this.series.map(({name}, place) => `${name} ${texts[place]}`).join(", ")}; at most ${this.unit(Math.max(0, ...heights))} in the last two minutes`);
    this.paths.forEach((path, number) => path.setAttribute("d", this.bars ? stacked(columns, number, highest) : joined(columns, number, highest)));
  }
}

function legend(name, colour, figure) {
  const mark = make("i");
  mark.style.background = `var(--${colour})`;
  return make("span", {class: "key"}, mark, `${name} `, figure);
}

const across = (age) => WIDE - age * COLUMN;

function stacked(columns, number, highest) {
  return columns.map(({age, values}) => {
    const below = values.slice(0, number).reduce((sum, value) => sum + value, 0), height = (values[number] / highest) * HIGH;
    const left = across(age) - COLUMN;
    return height > 0 ? `M${left.toFixed(1)} ${(HIGH - (below / highest) * HIGH).toFixed(1)}h${(COLUMN * 0.9).toFixed(1)}v${(-height).toFixed(1)}h${(-COLUMN * 0.9).toFixed(1)}z` : "";
  }).join("");
}

function joined(columns, number, highest) {
  let path = "", drawing = false;
  for (const {age, values} of columns) {
    const value = values[number];
    if (value !== null) path += `${drawing ? "L" : "M"}${(across(age) - COLUMN / 2).toFixed(1)} ${(HIGH - (value / highest) * (HIGH - 2)).toFixed(1)}`;
    if (value !== null && !drawing) path += "h.1";
    drawing = value !== null;
  }
  return path;
}

/** Return a strip coloured by the states of a breaker; `states` are {age, state}, the latest last. */
function strip(svg, states) {
  svg.replaceChildren();
  for (let first = 0; first < states.length;) {
    let last = first;
    while (last + 1 < states.length && states[last + 1].state === states[first].state) last += 1;
    const begins = across(states[first].age) - COLUMN, ends = last + 1 < states.length ? across(states[last].age) : WIDE;
    const box = shape("rect", {x: begins.toFixed(1), y: 0, width: (ends - begins + 0.4).toFixed(1), height: 14});
    box.style.fill = `var(--${states[first].state})`;
    svg.append(box);
    first = last + 1;
  }
}

/** Return the value below which a share of what lies in buckets is, or null if there is nothing; straight within a bucket. */
function quantile(bounds, buckets, share) {
  const all = buckets.reduce((sum, number) => sum + number, 0);
  let rest = share * all;
  for (let place = 0; all && place < buckets.length; place += 1) {
    if (buckets[place] && rest <= buckets[place]) {
      const low = place ? bounds[place - 1] : 0, high = bounds[place] ?? low;
      return low + (high - low) * (rest / buckets[place]);
    }
    rest -= buckets[place];
  }
  return null;
}
