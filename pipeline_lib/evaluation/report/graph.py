"""The lineage as a small drawn graph: one column a depth, inputs to the left of what they made."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from pipeline_lib.evaluation.report.lineage import Lineage, Node
from pipeline_lib.schema import ArtifactRef

_NODE_WIDTH, _NODE_HEIGHT = 128, 42
_LANE_HEIGHT = 6
_COLUMN_GAP, _ROW_GAP, _MARGIN = 30, 16, 4
_SMALLEST_SCALE, _LARGEST_SCALE = 0.88, 1.1

_Cell = tuple[ArtifactRef, int]
"""An artifact in its own column, or in a later one that an edge from it passes through."""
_Edges = Mapping[ArtifactRef, list[ArtifactRef]]
"""Direct inputs by artifact."""


def lineage_chart(lineage: Lineage) -> Markup:
    """Draw every artifact as a box and every direct input as an edge.

    An edge that a longer chain of edges implies is left out, as in a Hasse diagram: the table on
    the page has them all. An edge over several columns has a lane of its own between the boxes.
    """
    column_of = _columns(lineage)
    edges = _reduced_edges(lineage)
    layout = _layout(column_of, edges)
    height = 2 * _MARGIN + max(_height(cells, column_of) for cells in layout)
    width = 2 * _MARGIN + len(layout) * (_NODE_WIDTH + _COLUMN_GAP) - _COLUMN_GAP
    places = _place(layout, column_of, edges, height)
    drawn = [
        _edge(
            [places[source, column] for column in range(column_of[source], column_of[target])]
            + [places[target, column_of[target]]]
        )
        for target, sources in edges.items()
        for source in sources
    ]
    drawn += [_box(node, places[node.ref, column_of[node.ref]]) for node in lineage.nodes]
    return Markup(
        '<svg class="graph" style="min-width:{least}px;max-width:{most}px" viewBox="0 0 {w} {h}" role="img" '
        'aria-label="Lineage: inputs on the left, the verdict on the right">{drawn}</svg>'
    ).format(
        least=round(width * _SMALLEST_SCALE),
        most=round(width * _LARGEST_SCALE),
        w=width,
        h=height,
        drawn=Markup("").join(drawn),
    )


def _columns(lineage: Lineage) -> dict[ArtifactRef, int]:
    """Return each artifact's column: its depth, all evaluations together, no column empty."""
    evaluated = max((node.depth for node in lineage.nodes if node.manifest.kind == "evaluation"), default=0)
    wanted = {node.ref: evaluated if node.manifest.kind == "evaluation" else node.depth for node in lineage.nodes}
    numbers = {depth: number for number, depth in enumerate(sorted(set(wanted.values())))}
    return {ref: numbers[depth] for ref, depth in wanted.items()}


def _reduced_edges(lineage: Lineage) -> _Edges:
    """Return each artifact's inputs without those that are also inputs of its inputs, at any depth."""
    below: dict[ArtifactRef, set[ArtifactRef]] = {}
    edges: dict[ArtifactRef, list[ArtifactRef]] = {}
    for node in lineage.nodes:  # inputs come before what was made from them
        inputs = dict.fromkeys(node.manifest.inputs.values())
        implied = set().union(*(below[ref] for ref in inputs))
        edges[node.ref] = [ref for ref in inputs if ref not in implied]
        below[node.ref] = implied | set(inputs)
    return edges


def _layout(column_of: Mapping[ArtifactRef, int], edges: _Edges) -> list[list[_Cell]]:
    """Return the cells of every column: its artifacts, and a lane for each artifact that passes by."""
    layout: list[list[_Cell]] = [[] for _ in range(1 + max(column_of.values()))]
    for ref, column in column_of.items():
        layout[column].append((ref, column))
    for target, sources in edges.items():
        for source in sources:
            for column in range(column_of[source] + 1, column_of[target]):
                if (source, column) not in layout[column]:
                    layout[column].append((source, column))
    return layout


def _place(
    layout: list[list[_Cell]], column_of: Mapping[ArtifactRef, int], edges: _Edges, height: float
) -> dict[_Cell, tuple[float, float]]:
    """Place columns from left to right, cells near the middle of what leads to them.

    Returns:
        Left end and vertical middle of every cell.
    """
    places: dict[_Cell, tuple[float, float]] = {}
    for number, cells in enumerate(layout):
        wished = {cell: _middle(cell, column_of, edges, places) for cell in cells}
        y = (height - _height(cells, column_of)) / 2
        for cell in sorted(cells, key=wished.__getitem__):
            own = _cell_height(cell, column_of)
            places[cell] = (_MARGIN + number * (_NODE_WIDTH + _COLUMN_GAP), y + own / 2)
            y += own + _ROW_GAP
    return places


def _middle(
    cell: _Cell,
    column_of: Mapping[ArtifactRef, int],
    edges: _Edges,
    places: Mapping[_Cell, tuple[float, float]],
) -> float:
    ref, column = cell
    sources = edges[ref] if column_of[ref] == column else [ref]
    before = [places[source, column - 1][1] for source in sources]
    return sum(before) / len(before) if before else 0.0


def _cell_height(cell: _Cell, column_of: Mapping[ArtifactRef, int]) -> float:
    return _NODE_HEIGHT if column_of[cell[0]] == cell[1] else _LANE_HEIGHT


def _height(cells: list[_Cell], column_of: Mapping[ArtifactRef, int]) -> float:
    return sum(_cell_height(cell, column_of) + _ROW_GAP for cell in cells) - _ROW_GAP


def _edge(way: list[tuple[float, float]]) -> Markup:
    """Draw a curve from the first cell to the last, straight through the cells between."""
    x, y = way[0][0] + _NODE_WIDTH, way[0][1]
    parts = [f"M{x:g} {y:.1f}"]
    for next_x, next_y in way[1:]:
        bend = (next_x - x) / 2
        parts.append(f"C{x + bend:g} {y:.1f} {next_x - bend:g} {next_y:.1f} {next_x:g} {next_y:.1f}")
        x, y = next_x + _NODE_WIDTH, next_y
        parts.append(f"H{x:g}")
    return Markup('<path class="edge" d="{}"/>').format(" ".join(parts[:-1]))


def _box(node: Node, place: tuple[float, float]) -> Markup:
    x, y = place[0], place[1] - _NODE_HEIGHT / 2
    css = "node inherited" if node.is_inherited else f"node k-{node.manifest.kind}"
    return Markup(
        '<g class="{css}"><title>{ref}</title><rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>'
        '<text class="label" x="{tx}" y="{ty}">{title}</text><text class="tick" x="{tx}" y="{uy}">{short}</text></g>'
    ).format(
        css=css, ref=str(node.ref), x=x, y=y, w=_NODE_WIDTH, h=_NODE_HEIGHT, tx=x + 10, ty=y + 18, uy=y + 33,
        title=node.title, short=node.ref.id[:12],
    )  # fmt: skip
