"""The end of a pilot: which candidate is worth the main run, if any."""

from typing import NamedTuple

from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from components.cli import component, main


@component
def verdict(
    spec: str,
    results: list,
    rows: Input[Dataset],
    pilot: Output[Artifact],
    metrics: Output[Metrics],
    audited: list = [],  # noqa: B006 - KFP reads the default
    shards: list = [],  # noqa: B006 - KFP reads the default
) -> NamedTuple("Outputs", [("chosen", str)]):  # type: ignore[valid-type]
    """Tell from the short runs what the main run would gain over cross-entropy only, and by which candidate.

    Prints the candidate that is chosen.

    Args:
        spec: The whole spec.
        results: What each trial printed.
        rows: Folder of rows that prepare wrote (shard 0).
        pilot: The verdict, one JSON file.
        metrics: The expected gain, for KFP.
        audited: What audit printed.
        shards: URIs of the other shards' rows.

    Returns:
        chosen: The candidate, as the pilot section has it, as JSON; of the name ce for cross-entropy only.
    """
    from xtoken_core.workflow.step import step

    with step("verdict", pilot):
        from xtoken_core.data.statistics import rows_in
        from xtoken_core.report.verdict import pilot_verdict
        from xtoken_core.results.pilot import Trial
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.workflow.figures import log_figures, pilot_figures
        from xtoken_core.workflow.pilot_verdict import judge
        from xtoken_core.workflow.rungs import chosen_candidate

        parsed = DistillationSpec.from_text(spec)
        trials = [Trial.from_parameter(result) for result in results]
        found = judge(parsed, trials, rows_in((rows.path, *shards)), audited)
        found.write(pilot.path)
        print(pilot_verdict(found), flush=True)
        log_figures(metrics, pilot_figures(found))
        return (chosen_candidate(parsed, found.chosen),)


if __name__ == "__main__":
    main(verdict)
