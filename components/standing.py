"""Between two rungs of a pilot: which candidates go on."""

from typing import NamedTuple

from components.cli import component, main


@component
def standing(results: list) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("names", list), ("started", float), ("seconds", float)]
):
    """Rank the candidates of a rung by the bits per byte of their short runs.

    Args:
        results: What each trial of the rung printed.

    Returns:
        names: The candidates that have an outcome, best first.
        started: When this step started (Unix time).
        seconds: How long it took.
    """
    from xtoken_core.workflow.step import step

    with step("standing") as times:
        from xtoken_core.results.pilot import Trial
        from xtoken_core.workflow.rungs import standing

        names = standing([Trial.from_parameter(result) for result in results])
        print(f"best first: {', '.join(names) or 'no candidate has an outcome'}", flush=True)
        return (names, *times().values())


if __name__ == "__main__":
    main(standing)
