"""Draw the diagrams of the documentation: ``python docs/pictures/draw.py``.

Each is one SVG file with two themes. The reader's system chooses.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

from titan_moe_lb.pages import palette

HERE = Path(__file__).parent
STUDY = HERE.parent / "evidence" / "study.json"
COURSES = HERE.parent / "evidence" / "study_courses.json"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def theme(colors: dict[str, str]) -> str:
    return "".join(f"--{name}: {color}; " for name, color in colors.items())


class Picture:
    """SVG picture under construction, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [f"<title>{escape(title)}</title>"]

    def box(self, x, y, width, height, fill="surface", edge="edge", dash="") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'style="fill: var(--{fill}); stroke: var(--{edge})" stroke-dasharray="{dash}"/>'
        )

    def bar(self, x, y, width, height, fill) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'style="fill: var(--{fill})"/>'
        )

    def text(
        self, x, y, text, size=14, color="ink", anchor="start", bold=False, mono=False
    ) -> None:
        family = "font-family: ui-monospace, 'DejaVu Sans Mono', monospace;" if mono else ""
        weight = "font-weight: 600;" if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" xml:space="preserve" '
            f'style="fill: var(--{color}); font-size: {size}px; {family}{weight}">{escape(text)}</text>'
        )

    def line(self, points, color="edge", arrow=False, dash="", width=1.5) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        end = f' marker-end="url(#{color})"' if arrow else ""
        self.parts.append(
            f'<path d="{path}" style="fill: none; stroke: var(--{color}); stroke-width: {width}" '
            f'stroke-dasharray="{dash}"{end}/>'
        )

    def node(self, x, y, width, lines, fill="surface", edge="edge") -> None:
        """Draw a box of two lines: a name and a description."""
        self.box(x, y, width, 50, fill, edge)
        self.text(x + width / 2, y + 21, lines[0], 14, anchor="middle", bold=True)
        self.text(x + width / 2, y + 39, lines[1], 12, "soft", "middle")

    def save(self, name: str) -> None:
        heads = "".join(
            f'<marker id="{color}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" '
            f'style="fill: var(--{color})"/></marker>'
            for color in ("edge", "blue", "orange", "green")
        )
        style = (
            f"svg {{ {theme(palette.LIGHT)}font-family: {FONT}; }}\n"
            f"@media (prefers-color-scheme: dark) {{ svg {{ {theme(palette.DARK)} }} }}"
        )
        body = "\n".join(self.parts)
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<style>{style}</style>\n<defs>{heads}</defs>\n"
            f'<rect width="100%" height="100%" style="fill: var(--paper)"/>\n{body}\n</svg>\n'
        )


def router_to_report() -> None:
    p = Picture(900, 330, "From the router to the report")
    p.text(20, 28, "forward, every micro-batch", 12, "soft")
    p.node(20, 40, 150, ("router scores", "one for each expert"))
    p.node(230, 40, 150, ("score + bias", "for the choice alone"))
    p.node(440, 40, 150, ("top-K experts", "tokens dispatched"))
    p.node(700, 40, 180, ("counts", "buffers on the device"), edge="blue")
    for start, stop in ((170, 228), (380, 438), (590, 698)):
        p.line([(start, 65), (stop, 65)], arrow=True)
    p.text(440, 148, "end of a step", 12, "soft")
    p.node(700, 160, 180, ("one sum over ranks", "one all-reduce an axis"), edge="blue")
    p.line([(790, 90), (790, 158)], "blue", arrow=True)
    p.node(440, 160, 150, ("bias rule", "all layers at once"), edge="green")
    p.line([(700, 185), (592, 185)], "green", arrow=True)
    p.line([(440, 185), (305, 185), (305, 92)], "green", arrow=True)
    p.node(20, 160, 150, ("aux losses", "f and P"), edge="orange")
    p.line([(95, 160), (95, 92)], "orange", arrow=True)
    p.text(104, 132, "gradient, in backward", 12, "soft")
    p.text(20, 262, "a logged step: the host reads", 12, "soft")
    p.node(700, 270, 180, ("metrics", "console, TensorBoard, W&B"))
    p.node(440, 270, 180, ("moe_load.arrow", "every logged step, exactly"))
    p.node(
        20, 270, 340, ("report · watch · diagnose · plan · place", "read the file, never the run")
    )
    p.line([(790, 210), (790, 268)], arrow=True)
    p.line([(700, 295), (622, 295)], arrow=True)
    p.line([(440, 295), (362, 295)], arrow=True)
    p.save("router_to_report.svg")


def batch_cut() -> None:
    p = Picture(900, 300, "One global batch, cut three ways, has one gradient")
    rows = (
        ("one process", [[range(8)]], ["w · (s1 + ... + s8) / 8"]),
        (
            "two data-parallel ranks",
            [[range(4)], [range(4, 8)]],
            ["w · (s1 + ... + s4) / 8", "w · (s5 + ... + s8) / 8"],
        ),
        (
            "two accumulation steps of two micro-batches",
            [[range(2), range(2, 4)], [range(4, 6), range(6, 8)]],
            ["w · (s1 + s2) / 8 + w · (s3 + s4) / 8", "w · (s5 + s6) / 8 + w · (s7 + s8) / 8"],
        ),
    )
    for row, (name, groups, sums) in enumerate(rows):
        y = 30 + row * 90
        p.text(20, y, name, 14, bold=True)
        x = 20.0
        for group in groups:
            left = x
            for part in group:
                for number in part:
                    p.box(
                        x,
                        y + 14,
                        28,
                        28,
                        ("load-1", "load-3")[groups.index(group)] if len(groups) > 1 else "grid",
                    )
                    p.text(x + 14, y + 33, f"s{number + 1}", 12, anchor="middle")
                    x += 32
                x += 8
            p.line([(left, y + 50), (x - 12, y + 50)], "edge")
            x += 16
        for index, text in enumerate(sums):
            p.text(400, y + 24 + 18 * index, text, 13, mono=True)
        p.text(735, y + 33, "= one gradient", 14, "green", bold=True)
    p.text(
        20,
        290,
        "s1 ... s8: aux loss of each sequence. torchtitan adds the parts and divides by nothing.",
        12,
        "soft",
    )
    p.save("batch_cut.svg")


def ep_skew() -> None:
    p = Picture(900, 300, "One hot expert makes one rank late, and all ranks wait")
    loads = [3.0] + [5 / 7] * 7
    p.text(20, 28, "load of 8 experts, over the mean", 13, bold=True)
    p.text(480, 28, "time of a layer on 4 ranks", 13, bold=True)
    base, scale = 220, 50
    for expert, load in enumerate(loads):
        x = 30 + expert * 46 + (expert // 2) * 10
        p.bar(x, base - load * scale, 36, load * scale, "load-4" if load > 1 else "load-1")
        p.text(x + 18, base + 18, f"e{expert}", 12, "soft", "middle")
    p.line([(20, base - scale), (440, base - scale)], "edge", dash="4 4")
    p.text(440, base - scale - 6, "mean", 12, "soft", "end")
    for rank in range(4):
        x = 30 + rank * 102
        p.line([(x, base + 26), (x + 82, base + 26)], "edge")
        p.text(x + 41, base + 44, f"rank {rank}", 12, "soft", "middle")
    longest = loads[0] + loads[1]
    for rank in range(4):
        y = 52 + rank * 44
        work = (loads[2 * rank] + loads[2 * rank + 1]) / longest * 330
        p.text(480, y + 20, f"rank {rank}", 13)
        p.bar(540, y, work, 30, "load-4" if rank == 0 else "load-1")
        if work < 329:
            p.box(540 + work, y, 330 - work, 30, "paper", "edge", "4 4")
            p.text(540 + (work + 330) / 2, y + 20, "waits", 12, "soft", "middle")
    p.line([(870, 44), (870, 232)], "edge")
    p.text(
        870,
        250,
        f"receiver skew {longest / 2:.2f}: experts take 1.86 times balance",
        13,
        anchor="end",
    )
    p.text(
        20,
        288,
        "More experts on a rank dilute a hot one; expert parallelism of a higher degree makes it worse.",
        12,
        "soft",
    )
    p.save("ep_skew.svg")


def pipeline_tokens() -> None:
    p = Picture(900, 330, "Tokens that a pipeline rank holds for its backward")
    loads = (1.0, 1.4, 0.8, 1.2)
    actions = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
    p.text(20, 28, "first of two stages, 1F1B, four micro-batches", 13, bold=True)
    width, x0 = 88, 150
    p.text(20, 66, "actions", 13)
    p.text(20, 170, "tokens held", 13)
    p.text(20, 188, "(balanced = 1", 12, "soft")
    p.text(20, 204, "a micro-batch)", 12, "soft")
    base, scale = 270, 60
    for level in (0, 1, 2):
        p.line([(x0, base - level * scale), (x0 + 8 * width, base - level * scale)], "line")
        p.text(x0 - 8, base - level * scale + 4, str(level), 12, "soft", "end")
    held, even, peak, peak_even = 0.0, 0, 0.0, 0
    for index, action in enumerate(actions):
        kind, number = action[0], int(action[1])
        x = x0 + index * width
        forward = kind == "F"
        p.box(x + 2, 46, width - 4, 32, "load-1" if forward else "load-3")
        name = f"forward {number}" if forward else f"backward {number}"
        p.text(x + width / 2, 66, name, 12, anchor="middle")
        if forward:  # held from the forward until its backward has ended
            held, even = held + loads[number], even + 1
        p.bar(
            x + 10,
            base - held * scale,
            width - 20,
            held * scale,
            "load-4" if held > 2.3 else "load-1",
        )
        p.line([(x + 4, base - even * scale), (x + width - 4, base - even * scale)], "ink", width=2)
        p.text(x + width / 2, base - held * scale - 6, f"{held:.1f}", 12, anchor="middle")
        peak, peak_even = max(peak, held), max(peak_even, even)
        if not forward:
            held, even = held - loads[number], even - 1
    p.text(
        20,
        312,
        f"Cumulative overload: peak {peak:.1f} over the peak of a balanced rank, {peak_even} (lines) = {peak / peak_even:.2f}",
        14,
        bold=True,
    )
    p.save("pipeline_tokens.svg")


def diagnosis() -> None:
    p = Picture(900, 250, "The parts of a finding")
    lines = (
        (
            "warning (hot expert): expert 60 of layer 14 gets 2.60 times its share",
            "severity, check, place",
        ),
        (
            "seen   the hottest rank gets 1.21 times its share, 1.15 without the excess",
            "numbers of this run",
        ),
        ("why    above 2 times, and beyond chance", "bound that they cross"),
        ("do     ten times the speed of the bias, or a rule without one", "what helps"),
        ('try    expert_bias = {type = "quantile"}', "line of the job file"),
    )
    p.box(16, 16, 660, 216)
    for index, (text, label) in enumerate(lines):
        y = 52 + index * 38
        p.text(
            32,
            y,
            text,
            13 if index else 13,
            "warning-ink" if index == 0 else "ink",
            mono=True,
            bold=index == 0,
        )
        p.line([(690, y - 4), (708, y - 4)], "edge")
        p.text(714, y, label, 13, "soft")
    p.save("diagnosis.svg")


NAMES = {"deepseek_v3_sigmoid": "sigmoid scores", "qwen3_softmax": "softmax scores"}


def study() -> None:
    settings = json.loads(STUDY.read_text())["settings"]
    models = list(dict.fromkeys(one["model"] for one in settings))
    p = Picture(900, 66 + 300 * len(models), "Twelve methods on two models")
    for index, model in enumerate(models):
        top = 56 + index * 300
        rows = [one for one in settings if one["model"] == model]
        p.text(20, top - 26, NAMES.get(model, model.replace("_", " ")), 15, bold=True)
        for left, key, title, log in (
            (270, "max_violation", "MaxVio, last 75 steps (logarithmic; left is more even)", True),
            (610, "validation_loss", "held-out loss (left is better)", False),
        ):
            values = [one["numbers"][key] for one in rows]
            scale = math.log if log else float
            low, high = (
                f(scale(v[end]) for v in values) for f, end in ((min, "low"), (max, "high"))
            )

            def place(value, left=left, low=low, high=high, scale=scale):
                return left + (scale(value) - low) / (high - low) * 260

            p.text(left, top - 8, title, 12, "soft")
            for number, value in enumerate(values):
                y = top + 14 + number * 20
                color = "red" if rows[number]["setting"] == "none" else "blue"
                p.line([(left, y), (left + 260, y)], "grid", width=1)
                p.line([(place(value["low"]), y), (place(value["high"]), y)], color, width=3)
                p.parts.append(
                    f'<circle cx="{place(value["mean"]):.1f}" cy="{y}" r="4.5" '
                    f'style="fill: var(--{color})"/>'
                )
            for end in (low, high):
                shown = math.exp(end) if log else end
                x = left if end == low else left + 260
                p.text(x, top + 268, f"{shown:.2f}", 11, "soft", "start" if end == low else "end")
        for number, one in enumerate(rows):
            p.text(250, top + 18 + number * 20, one["setting"], 12, anchor="end")
    p.text(20, p.height - 8, "Point: mean of three seeds. Line: lowest to highest.", 12, "soft")
    p.save("study.svg")


PENS = {"none": ("red", ""), "quantile": ("blue", "5 4"), "momentum 5e-3": ("green", "")}
PENS["proportional 0.1"] = ("orange", "")


def study_courses() -> None:
    courses = json.loads(COURSES.read_text())
    p = Picture(900, 330, "MaxVio over the steps of the study")
    width, height, base = 330, 210, 270
    for left, model in ((60, "deepseek_v3_sigmoid"), (490, "qwen3_softmax")):
        p.text(left, 28, NAMES[model], 15, bold=True)
        p.text(left, 48, "MaxVio, mean over layers and three seeds", 12, "soft")
        for level in (0, 1, 2, 3):
            y = base - level * height / 3
            p.line([(left, y), (left + width, y)], "grid", width=1)
            p.text(left - 8, y + 4, str(level), 12, "soft", "end")
        balanced = base - 0.5 * height / 3
        p.line([(left, balanced), (left + width, balanced)], "edge", dash="2 4", width=1)
        for step in (0, 100, 200, 300):
            p.text(left + step / 300 * width, base + 18, str(step), 12, "soft", "middle")
        p.text(left + width / 2, base + 38, "step", 12, "soft", "middle")
        for row, (name, values) in enumerate(courses[model].items()):
            color, dash = PENS[name]
            points = [
                (left + step / 300 * width, base - value * height / 3)
                for step, value in zip(courses["steps"], values, strict=True)
            ]
            p.line(points, color, dash=dash, width=2.2)
            y = 74 + row * 18
            p.line([(left + 190, y - 4), (left + 214, y - 4)], color, dash=dash, width=2.2)
            p.text(left + 222, y, name, 12)
    p.text(
        20, 322, "Dotted line: 0.5, below which the study counts a step as balanced.", 12, "soft"
    )
    p.save("study_courses.svg")


if __name__ == "__main__":
    drawings = (router_to_report, batch_cut, ep_skew, pipeline_tokens, diagnosis, study)
    for draw in (*drawings, study_courses):
        draw()
