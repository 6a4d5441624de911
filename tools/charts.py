"""Charts of benchmark results, as SVG: bars that fit any width, and the trade-off of the start page."""
from html import escape
from math import log2

import numpy as np

OURS, OTHERS = "#1765ad", "#6b7078"


def number(value: float) -> str:
    "Three significant digits, without an exponent."
    if not value: return "0"
    digits = np.format_float_positional(value, 3, unique=False, fractional=False).rstrip(".")
    return digits if abs(float(digits)) < 1000 else f"{int(float(digits)):,}"


def bars(rows: list[tuple[str, float, bool]], unit: str) -> str:
    "Horizontal bars: a label above each, its number behind it. Widths are percentages, so that text never shrinks."
    most = max(value for _, value, _ in rows) or 1
    said = escape(alt(rows, unit))
    parts = [f'<svg class="bars" role="img" width="100%" height="{44 * len(rows)}" aria-label="{said}">']
    for y, (label, value, ours) in enumerate(rows):
        kind, width = "ours" if ours else "others", max(0.3, 80 * value / most)
        parts += [
            f'<text x="0" y="{44 * y + 14}" class="{kind}">{escape(label)}</text>',
            f'<rect x="0" y="{44 * y + 20}" width="{width:.1f}%" height="16" class="{kind}"/>',
            f'<text x="{width + 1:.1f}%" y="{44 * y + 33}" class="{kind}">{number(value)}</text>',
        ]
    return "".join(parts) + "</svg>"


def alt(rows: list[tuple[str, float, bool]], unit: str) -> str:
    "What the bars say, in words."
    return f"Bar chart, {unit}: " + "; ".join(f"{label} {number(value)}" for label, value, _ in rows)


# ---------------------------------------------------------------- the trade-off

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 330, 62, 20, 14, 52
Box = tuple[float, float, float, float]  # left, top, right, bottom


def tradeoff(points: list[dict]) -> str:
    "Accuracy against the latency of one text, as a file: markers are as large as the model's bytes, ours are blue."
    low, high = min(p["latency"] for p in points) / 1.5, max(p["latency"] for p in points) * 1.5
    bottom = min(p["accuracy"] for p in points) - 0.012
    top = max(p["accuracy"] for p in points) + 0.012

    def x(latency): return LEFT + (WIDTH - LEFT - RIGHT) * log2(latency / low) / log2(high / low)
    def y(accuracy): return TOP + (HEIGHT - TOP - BOTTOM) * (top - accuracy) / (top - bottom)

    largest = max(p["bytes"] for p in points)
    marks = [(x(p["latency"]), y(p["accuracy"]), 5 + 15 * (p["bytes"] / largest) ** 0.5, p) for p in points]
    title = "Accuracy against latency of one text: " + "; ".join(
        f"{p['name']} {p['accuracy']:.1%}, {number(p['latency'])} ms, {number(p['bytes'] / 1e6)} MB" for p in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="16">',
        f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>',
    ]
    for tick in (t / 100 for t in range(0, 101)):
        if bottom < tick < top:
            parts += [f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e3e5e8"/>',
                      f'<text x="{LEFT - 8}" y="{y(tick) + 5:.1f}" text-anchor="end" fill="#444">{tick:.0%}</text>']
    for tick in (2.0**n for n in range(-6, 12)):
        if low < tick < high:
            parts += [f'<path d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e3e5e8"/>',
                      f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="#444">'
                      f'{tick:g} ms</text>']
    parts += [f'<text x="{LEFT}" y="{HEIGHT - 10}" fill="#444">'
              '← faster: latency of one text (log scale). Area: bytes on disk</text>']
    for cx, cy, r, p in marks:
        color = OURS if p["ours"] else OTHERS
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}" fill="{color}" fill-opacity=".55"/>')
    taken: list[Box] = [(cx - r, cy - r, cx + r, cy + r) for cx, cy, r, _ in marks]
    for cx, cy, r, p in marks:
        box = free(cx, cy, r, (9.9 if p["ours"] else 9.1) * len(p["name"]), taken)
        taken.append(box)
        tip = min(max(cx, box[0]), box[2]), box[1] if box[1] > cy else box[3]
        if abs(tip[1] - cy) > r + 8:
            parts.append(f'<path d="M{cx:.1f} {cy:.1f}L{tip[0]:.1f} {tip[1]:.1f}" stroke="#888"/>')
        style = f'fill="{OURS}" font-weight="bold"' if p["ours"] else 'fill="#444"'
        parts.append(f'<text x="{box[0]:.1f}" y="{box[3] - 4:.1f}" {style}>{escape(p["name"])}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def free(cx: float, cy: float, r: float, wide: float, taken: list[Box]) -> Box:
    "Where a label beside a marker covers least: above, below, to the right or to the left, near or farther off."
    places = [(cx + dx, cy + dy) for far in (3, 18, 34) for dx, dy in (
        (-wide / 2, -r - far - 19), (-wide / 2, r + far), (r + far, -8), (-r - far - wide, -8))]
    places = [(min(max(left, LEFT), WIDTH - RIGHT - wide), above) for left, above in places]
    boxes = [(left, above, left + wide, above + 19) for left, above in places if TOP <= above <= HEIGHT - BOTTOM - 19]
    return min(boxes, key=lambda box: sum(overlap(box, other) for other in taken))


def overlap(a: Box, b: Box) -> float:
    "The area that two boxes share."
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
