"""report.html: what was found, as one page that needs no network, in a browser of any width.

    python -m nanoroads.report.page                            writes experiments/report.html
    python -m nanoroads.report.page --folder out/experiments   of what the scripts have just found

all_roads.py writes such a page of its report.md, with a map to click on: what SFT, DPO and RLHF do
between a start and a goal. The page's style and script are in page.html.
"""

import html
import json
import re
from itertools import groupby
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.report.drawing import COLOURS, INK, NAMES, PALE
from nanoroads.report.figures import COAST, LAND, PLACE
from nanoroads.run.flags import Parser, run_script
from nanoroads.weights.files import read_json_object, write_text
from nanoroads.world.roadmap import NEIGHBOURS

TEMPLATE = Path(__file__).with_name("page.html")
MARK = "<!-- nanoroads.report.page -->"  # in each page, so that nobody's file is written over
LONG = 16  # a table of more rows begins closed
# What the colours of figures become in a page: colours of the page, which by night are others.
ON_ANY_GROUND = {INK: "currentColor", "#ffffff": "var(--ground)", PALE: "var(--line)", LAND: "var(--land)"}
ON_ANY_GROUND.update({COLOURS[road]: f"var(--{road})" for road in COLOURS if road != "optimum"})
# The kinds of lines in our Markdown, the first that fits; a line of no kind here is text.
KINDS = {
    "blank": r"\s*$",
    "table": r"\|",
    "figure": r"!\[(.*)\]\(([\w.]+)\)$",
    "verdict": r"(?:- )?(yes|NO)[:,] (.*)",
    "heading": r"(#+) (.*)",
    "list": r"- (.*)",
    "quote": r"> (.*)",
}


def report_page(markdown: str, folder: Path, routes: dict | None) -> str:
    """The page of all_roads.py. markdown: report.md, whose figures lie in `folder`.

    routes: routes.json, see measures.map_routes; None: the page has no map."""
    title = markdown.partition("\n")[0].removeprefix("# ")
    if routes is None:
        return fill_template(title, to_html(markdown, folder), None)
    body = to_html(markdown.replace("![routes](routes.svg)\n", ""), folder)  # the map shows more
    return fill_template(title, body.replace("<h2>", '<section id="map"></section>\n<h2>', 1), routes)


def experiments_page(folder: Path) -> str:
    """The page of a folder that holds NAME/table.md or NAME/report.md for each experiment.

    They stand in the order of its README.md. Raises InputError where there is none."""
    tables = list(folder.glob("*/table.md")) + list(folder.glob("*/report.md"))
    if not tables:
        raise InputError(f"--folder {folder}: no folder in it holds a table.md or a report.md")
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""

    def place(name):
        found = re.search(rf"\b{re.escape(name)}(\.py|/)", text)
        return (found.start() if found else len(text), name)

    contents = []
    articles = []
    for name in sorted({path.parent.name for path in tables}, key=place):
        title, body = article(folder / name)
        anchor = html.escape(name)
        words = re.findall(r"<b .*?</b>", body)  # yes and NO, as its verdicts begin
        contents.append(f'<li><a href="#{anchor}">{inline(title)}</a> {" ".join(words)}</li>')
        articles.append(f'<article id="{anchor}">\n<h2>{inline(title)}</h2>\n{body}\n</article>')
    title = "Every claim, and what came out"
    body = [f'<h1>{title}</h1>\n<ol class="contents">', *contents, "</ol>", *articles]
    return fill_template(title, "\n".join(body), None)


def article(folder):
    """(title, body as HTML) of one experiment: its verdict, its figure, its table; or its report.md."""
    if not (folder / "table.md").exists():
        title, _, markdown = (folder / "report.md").read_text().partition("\n")
        return title.removeprefix("# "), to_html(markdown, folder, level=1)
    lines = (folder / "table.md").read_text().splitlines() + ["![figure](figure.svg)"]
    lines.sort(key=lambda line: {"verdict": 0, "figure": 1}.get(kind_of(line), 2))  # and then the table
    return read_json_object(folder / "results.json")["claim"], to_html("\n".join(lines), folder, level=1)


def fill_template(title, body, routes):
    """The template with its three gaps filled. title is text, body HTML, routes as routes.json has them."""
    data = {"routes": routes, "names": NAMES, "roads": NEIGHBOURS, "places": PLACE, "coast": COAST}
    # In a script element nothing is escaped, but no `<` may be there, which could end it.
    as_json = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    gaps = {"title": html.escape(title), "body": body, "data": as_json}
    return re.sub(r"\{\{(\w+)\}\}", lambda gap: gaps[gap[1]], TEMPLATE.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- from Markdown to HTML


def to_html(markdown: str, folder: Path, level: int = 0) -> str:
    """The Markdown that our reports are written in, as HTML, all text escaped.

    folder: where its figures lie. level: how much lower the headings become."""
    parts = []
    for kind, lines in groupby(markdown.splitlines(), kind_of):
        if kind == "table":
            parts.append(table_to_html(list(lines)))
        elif kind == "text":
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
        elif kind != "blank":
            for line in lines:
                parts.append(line_to_html(kind, line, folder, level))
    return "\n".join(parts)


def line_to_html(kind, line, folder, level):
    """A line of a kind whose lines each stand for themselves: a figure, a verdict, a heading, ..."""
    fields = re.match(KINDS[kind], line)
    if kind == "figure":
        return figure_to_html(folder / fields[2], html.escape(fields[1]))
    if kind == "verdict":
        word, text = fields.groups()
        mark = "undecided" if text.startswith("undecided: ") else word
        return f'<p class="verdict {word}"><b class="{mark}">{word}</b> {inline(text)}</p>'
    if kind == "heading":
        tag = f"h{len(fields[1]) + level}"
        return f"<{tag}>{inline(fields[2])}</{tag}>"
    if kind == "list":
        return f"<ul><li>{inline(fields[1])}</li></ul>"
    return f"<blockquote>{inline(fields[1])}</blockquote>"


def kind_of(line):
    """What a line of Markdown belongs to: one of KINDS, or "text"."""
    for kind, form in KINDS.items():
        if re.match(form, line):
            return kind
    return "text"


def inline(text):
    """A line's text as HTML: escaped, `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def table_to_html(lines):
    """A Markdown table; one of very many rows begins closed, one too wide for the window scrolls."""
    head, _, *rows = [line.strip()[1:-1].split("|") for line in lines]  # _: the rule under the head
    # Numbers stand at the right; what a column holds is known by its first row.
    first = rows[0] if rows else head
    styles = [' class="number"' if re.match(r"\s*[-+−]?[\d.]", cell) else "" for cell in first]
    parts = [row_to_html("th", head, styles)] + [row_to_html("td", row, styles) for row in rows]
    text = '<div class="wide"><table>\n' + "\n".join(parts) + "\n</table></div>"
    if len(rows) > LONG:
        text = f"<details><summary>{len(rows)} rows</summary>{text}</details>"
    return text


def row_to_html(tag, cells, styles):
    """A row of a table. styles: of each column, as attributes."""
    parts = [
        f"<{tag}{style}>{inline(cell.strip())}</{tag}>" for cell, style in zip(cells, styles, strict=True)
    ]
    return f"<tr>{''.join(parts)}</tr>"


def figure_to_html(path, alt):
    """A figure, an SVG, as part of the page, whose colours it then has."""
    svg = path.read_text(encoding="utf-8")
    # Left out: what stands before the drawing, what it says of itself for programs, and its style,
    # which would be the whole page's.
    svg = re.sub(r"^.*?(?=<svg)|<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Different figures use the same ids, which in one page would be confused.
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{html.escape(path.parent.name)}-{path.stem}-", svg)
    for colour, variable in ON_ANY_GROUND.items():
        svg = svg.replace(colour, variable)
    # As wide as it was drawn where there is room. Where there is little, it is to be scrolled, not small.
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = f'role="img" aria-label="{alt}" style="width: {width:.0f}pt; min-width: {0.6 * width:.0f}pt"'
    svg = svg.replace("<svg", f"<svg {label}", 1)
    return f"<figure>{svg}</figure>"


def main(argv=None):
    """Write the page of a folder of experiments."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the page").add_argument
    add("--folder", type=Path, default=Path("experiments"), help="of the results (default: %(default)s)")
    args = parser.parse_args(argv)
    path = args.folder / "report.html"
    if path.exists() and MARK not in path.read_text(errors="replace"):
        raise InputError(f"{path}: exists, and is no page of this command; move it away")
    write_text(path, experiments_page(args.folder))
    print(path)


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
