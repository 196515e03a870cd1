"""Line plots as SVG, for the page of a comparison and for the docs. Pure; nothing is fetched to show them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 260, 54, 18, 12, 34
_FEWEST_STEPS = 4


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) joined in their order; those that are not finite are left out. name: "" is not labelled."""

    points: Sequence[tuple[float, float]]
    color: str
    name: str = ""
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over two axes, each from 0 or, where there are negative values, from the least of them."""

    caption: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    dots: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(_finite(line) for line in self.lines)

    def svg(self) -> str:
        """Draw it; with the caption as its title."""
        xs, ys = ([p[i] for line in self.lines for p in _finite(line)] for i in (0, 1))
        scale_x = _Scale.over(xs, _LEFT, _WIDTH - _RIGHT)
        scale_y = _Scale.over(ys, _HEIGHT - _BOTTOM, _TOP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" font-size="11" font-family="sans-serif" role="img">'
            f"<title>{html.escape(self.caption)}</title>"
        ]
        parts.extend(self._axes(scale_x, scale_y))
        for i, line in enumerate(self.lines):
            parts.extend(self._drawn(line, scale_x, scale_y, i))
        return "".join([*parts, "</svg>"])

    def figure(self) -> str:
        """Draw it for a page, with its caption; "" if there is nothing to draw."""
        if self.is_empty:
            return ""
        return f"<figure>{self.svg()}<figcaption>{html.escape(self.caption)}</figcaption></figure>"

    def _axes(self, scale_x: _Scale, scale_y: _Scale) -> list[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for y in scale_y.ticks:
            at_y = scale_y.at(y)
            parts.append(
                f'<line x1="{_LEFT}" y1="{at_y:.1f}" x2="{right}" y2="{at_y:.1f}" stroke="#d0d7de"/>'
                f'<text x="{_LEFT - 4}" y="{at_y + 4:.1f}" text-anchor="end">{y:.6g}</text>'
            )
        for x in scale_x.ticks:
            parts.append(
                f'<text x="{scale_x.at(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:.6g}</text>'
            )
        middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
        parts.append(
            f'<text x="{middle_x}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(self.x_name)}</text>'
            f'<text x="12" y="{middle_y}" text-anchor="middle" transform="rotate(-90 12 {middle_y})">'
            f"{html.escape(self.y_name)}</text>"
        )
        return parts

    def _drawn(self, line: Line, scale_x: _Scale, scale_y: _Scale, place: int) -> list[str]:
        points = [(scale_x.at(x), scale_y.at(y)) for x, y in _finite(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if line.is_dashed else ""
        parts = [f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>']
        if self.dots:
            parts.extend(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{line.color}"/>' for x, y in points
            )
        if line.name:
            parts.append(
                f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - _BOTTOM - 8 - 14 * place}" text-anchor="end" '
                f'fill="{line.color}">{html.escape(line.name)}</text>'
            )
        return parts


@dataclass(frozen=True, slots=True)
class _Scale:
    """An axis from low to high, both whole multiples of step, drawn between begin and end."""

    low: float
    high: float
    step: float
    begin: float
    end: float

    @staticmethod
    def over(values: Sequence[float], begin: float, end: float) -> _Scale:
        low, high = min([0.0, *values]), max([0.0, *values])
        rough = ((high - low) or 1.0) / _FEWEST_STEPS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
        return _Scale(math.floor(low / step) * step, (math.ceil(high / step) or 1) * step, step, begin, end)

    @property
    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _finite(line: Line) -> list[tuple[float, float]]:
    return [point for point in line.points if all(map(math.isfinite, point))]
