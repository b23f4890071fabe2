"""The picture of the DAG: its tasks in columns, with their durations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import numpy as np

from xtoken_core.report.charts import duration
from xtoken_core.results.workflow import Task

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 142, 54, 44, 12
"""Of the DAG's boxes, in pixels."""
LONGEST_LINE = 21
"""Characters of a line in a box."""


@dataclass(frozen=True)
class Box:
    """A task of the DAG, its upper left corner in pixels."""

    name: str
    x: float
    y: float
    lines: list[str]
    """The name, broken at its first hyphen, and how long it took."""
    status: str


@dataclass(frozen=True)
class Dag:
    """The tasks as boxes in columns, what they wait for as curves."""

    width: float
    height: float
    boxes: list[Box]
    edges: list[str]
    """SVG paths."""
    box_width: ClassVar[int] = BOX_WIDTH
    box_height: ClassVar[int] = BOX_HEIGHT


def dag_picture(tasks: Sequence[Task]) -> Dag | None:
    """Lays the tasks out from left to right, each one column after the last it waits for; None without tasks.

    An edge that skips columns runs through a free place in each (a dummy node, as in Sugiyama, Tagawa & Toda, 1981, "Methods for
    visual understanding of hierarchical system structures"), and columns are ordered by the means of their neighbours, so that edges
    rarely cross.
    """
    if not tasks:
        return None
    known = {task.name: task for task in _shards_joined(tasks)}
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    graph.add_edges_from((before, name) for name, task in known.items() for before in task.after if before in known)
    graph = nx.transitive_reduction(graph)
    column = {name: depth for depth, layer in enumerate(nx.topological_generations(graph)) for name in layer}
    chains = [_chain(edge, column) for edge in graph.edges]
    layers: dict[int, list[Any]] = {}
    for name in known:
        layers.setdefault(column[name], []).append(name)
    for chain in chains:
        for node in chain[1:-1]:
            layers[node[1]].append(node)
    links = nx.Graph(pair for chain in chains for pair in zip(chain, chain[1:]))
    links.add_nodes_from(known)
    _order(layers, links)
    tallest = max(map(len, layers.values()))
    # in units of columns and rows, from the middle: the scale is the one that networkx would divide by
    placed = nx.multipartite_layout(links, subset_key=layers, scale=(max(len(layers), tallest) - 1) / 2)
    height = tallest * (BOX_HEIGHT + GAP_Y)
    center = {node: height / 2 + float(y) * (BOX_HEIGHT + GAP_Y) for node, (_, y) in placed.items()}
    boxes = [
        Box(name, column[name] * (BOX_WIDTH + GAP_X), center[name] - BOX_HEIGHT / 2, _task_lines(task), task.status)
        for name, task in known.items()
    ]
    edges = [_edge([(column[n] if n in column else n[1], center[n]) for n in chain]) for chain in chains]
    return Dag(len(layers) * (BOX_WIDTH + GAP_X) - GAP_X, height, boxes, edges)


def _shards_joined(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with all shards of prepare as one, and so those of a teacher's scores; each takes as long as the longest of its shards."""
    sharded = any(re.fullmatch(r"prepare-\d+", task.name) for task in tasks)
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        of_shard = re.fullmatch(r"(prepare|score-.+)-\d+", task.name) if sharded else None
        groups.setdefault(of_shard[1] if of_shard else task.name, []).append(task)
    names = {
        task.name: f"{name}-{len(group)} shards" if group[0].name != name else name
        for name, group in groups.items()
        for task in group
    }
    return [_joined(group, names) for group in groups.values()]


def _joined(shards: Sequence[Task], names: Mapping[str, str]) -> Task:
    """Shards as one task; names: of the joined task, by that of each shard."""
    seconds = [shard.seconds for shard in shards if shard.seconds is not None]
    status = next((shard.status for shard in shards if shard.status != "cached"), "cached")
    after = dict.fromkeys(names.get(before, before) for shard in shards for before in shard.after)
    joined = {"name": names[shards[0].name], "after": list(after), "seconds": max(seconds, default=None), "status": status}
    return shards[0].model_copy(update=joined)


def _chain(edge: tuple[str, str], column: dict[str, int]) -> list[Any]:
    """The edge's two tasks with a dummy node, (edge, column), in every column between."""
    start, end = edge
    return [start, *((edge, depth) for depth in range(column[start] + 1, column[end])), end]


def _order(layers: dict[int, list[Any]], links: nx.Graph) -> None:
    """Orders every layer in place by the mean position of its neighbours, sweeping to and fro."""
    position = {node: i - len(layer) / 2 for layer in layers.values() for i, node in enumerate(layer)}
    for _ in range(6):
        for layer in (*layers.values(), *reversed(layers.values())):
            mean = {node: float(np.mean([position[n] for n in links[node]] or [position[node]])) for node in layer}
            layer.sort(key=lambda node: mean[node])
            position.update({node: i - len(layer) / 2 for i, node in enumerate(layer)})


def _edge(stops: list[tuple[int, float]]) -> str:
    """A smooth path from the right side of the first stop through thin places to the left side of the last."""
    pitch = BOX_WIDTH + GAP_X
    x, y = stops[0][0] * pitch + BOX_WIDTH, stops[0][1]
    path = f"M{x:.0f} {y:.1f}"
    for index, (depth, next_y) in enumerate(stops[1:], 1):
        next_x = depth * pitch
        middle = (x + next_x) / 2
        path += f"C{middle:.0f} {y:.1f} {middle:.0f} {next_y:.1f} {next_x:.0f} {next_y:.1f}"
        x, y = next_x, next_y
        if index < len(stops) - 1:
            x += BOX_WIDTH
            path += f"H{x:.0f}"
    return path


def _task_lines(task: Task) -> list[str]:
    kind, _, rest = task.name.partition("-")
    time = [duration(task.seconds)] if task.seconds is not None else []
    words = ["from cache"] if task.status == "cached" else []
    shortened = rest if len(rest) <= LONGEST_LINE else rest[: LONGEST_LINE - 1] + "…"
    return [kind, *([shortened] if rest else []), ", ".join([*words, *time]) or "done"]
