//! A plot with logarithmic axes, as SVG. Nothing more than these four need.

use std::fmt::Write as _;
use std::path::Path;

pub(crate) struct Line {
    pub(crate) name: String,
    /// What is compared with each other: one colour and one kind of mark.
    pub(crate) group: usize,
    /// Whose it is.
    pub(crate) stroke: Stroke,
    pub(crate) points: Vec<(f64, f64)>,
}

/// So that a plot can be read without its colours.
#[derive(Clone, Copy)]
pub(crate) enum Stroke {
    Ours,
    Reference,
    /// Of ours, too, and nearer to what ours does.
    SecondReference,
}

impl Stroke {
    fn dashes(self) -> &'static str {
        match self {
            Self::Ours => "",
            Self::Reference => " stroke-dasharray=\"8 5\"",
            Self::SecondReference => " stroke-dasharray=\"2 4\"",
        }
    }
}

/// A circle, a square, a triangle.
fn mark(group: usize, x: f64, y: f64) -> String {
    let colour = COLOURS[group % COLOURS.len()];
    match group % COLOURS.len() {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"),
        1 => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\" fill=\"{colour}\"/>",
            x - 3.5,
            y - 3.5
        ),
        _ => format!(
            "<polygon points=\"{:.1},{:.1} {:.1},{:.1} {x:.1},{:.1}\" fill=\"{colour}\"/>",
            x - 4.5,
            y + 3.5,
            x + 4.5,
            y + 3.5,
            y - 4.5
        ),
    }
}

/// Ours and its reference, in turn.
pub(crate) fn pairs(names: &[(&str, &str)], points: Vec<Vec<(f64, f64)>>) -> Vec<Line> {
    let names = names
        .iter()
        .enumerate()
        .flat_map(|(group, (ours, reference))| {
            [
                (group, *ours, Stroke::Ours),
                (group, *reference, Stroke::Reference),
            ]
        });
    let lines = names.zip(points);
    lines
        .map(|((group, name, stroke), points)| Line {
            name: name.to_owned(),
            group,
            stroke,
            points,
        })
        .collect()
}

const WIDTH: f64 = 640.0;
/// Of the plot with its axes; the names of the lines come below.
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const ROW: f64 = 18.0;
/// Readable on white, which the plot brings along: it may stand on a dark page.
const COLOURS: [&str; 3] = ["#0b6e99", "#c4554d", "#548164"];

struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    /// Whole decades around the values.
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut most) = (f64::MAX, f64::MIN);
        for value in values.filter(|v| *v > 0.0) {
            least = least.min(value.log10());
            most = most.max(value.log10());
        }
        let from = least.floor();
        Self {
            from,
            to: most.ceil().max(from + 1.0),
        }
    }

    fn place(&self, value: f64) -> f64 {
        (value.max(f64::MIN_POSITIVE).log10() - self.from) / (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (from, to) = (self.from as i32, self.to as i32);
        (from..=to).map(|power| 10f64.powi(power))
    }
}

/// Draws nothing where there is no directory to draw to: a short run has other figures.
pub(crate) fn write(
    docs: Option<&Path>,
    name: &str,
    title: &str,
    x: &str,
    y: &str,
    lines: &[Line],
) {
    let Some(docs) = docs else { return };
    let points = || lines.iter().flat_map(|line| line.points.iter());
    let across = Axis::around(points().map(|p| p.0));
    let up = Axis::around(points().map(|p| p.1));
    let at_x = |v: f64| LEFT + across.place(v) * (WIDTH - LEFT - RIGHT);
    let at_y = |v: f64| HEIGHT - BOTTOM - up.place(v) * (HEIGHT - TOP - BOTTOM);
    let mut svg = String::new();
    let mut put = |text: String| {
        svg.push_str(&text);
        svg.push('\n');
    };
    let whole = HEIGHT + ROW * lines.len() as f64 + 8.0;
    put(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {whole}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">"
    ));
    put(format!(
        "<rect width=\"{WIDTH}\" height=\"{whole}\" fill=\"white\"/>"
    ));
    put(format!(
        "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}</text>"
    ));
    for tick in across.ticks() {
        let x = at_x(tick);
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);
        put(format!(
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#ddd\"/>"
        ));
        let y = bottom + 16.0;
        put(format!(
            "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>",
            number(tick)
        ));
    }
    for tick in up.ticks() {
        let y = at_y(tick);
        let right = WIDTH - RIGHT;
        put(format!(
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"
        ));
        let (x, y) = (LEFT - 6.0, y + 4.0);
        put(format!(
            "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
            number(tick)
        ));
    }
    for (n, line) in lines.iter().enumerate() {
        let colour = COLOURS[line.group % COLOURS.len()];
        let dashes = line.stroke.dashes();
        let mut path = String::new();
        for (x, y) in &line.points {
            let _ = write!(path, "{:.1},{:.1} ", at_x(*x), at_y(*y));
        }
        put(format!(
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>"
        ));
        for (x, y) in &line.points {
            put(mark(line.group, at_x(*x), at_y(*y)));
        }
        let y = HEIGHT + ROW * n as f64;
        put(format!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
            LEFT + 30.0
        ));
        put(mark(line.group, LEFT + 15.0, y));
        put(format!(
            "<text x=\"{}\" y=\"{}\">{}</text>",
            LEFT + 40.0,
            y + 4.0,
            line.name
        ));
    }
    let middle = LEFT + (WIDTH - LEFT - RIGHT) / 2.0;
    put(format!(
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{x}</text>",
        HEIGHT - 12.0
    ));
    let half = TOP + (HEIGHT - TOP - BOTTOM) / 2.0;
    put(format!(
        "<text x=\"16\" y=\"{half}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {half})\">{y}</text>"
    ));
    put("</svg>".to_owned());
    std::fs::write(docs.join(name), svg).expect("docs/ can be written");
    println!("\nPlot: docs/{name}");
}

fn number(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{}G", v / 1e9),
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}
