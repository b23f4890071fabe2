"""Last step of a sweep: its runs side by side."""

from kfp.dsl import HTML, Output

from components.cli import component, main


@component
def compare(runs: list, page: Output[HTML]):
    """Put finished runs side by side on one page.

    Args:
        runs: The output.uri of each run.
        page: The page, one HTML file.
    """
    from xtoken_core.workflow.step import step

    with step("compare", page):
        from xtoken_core.report.compare import write_comparison
        from xtoken_core.report.run import Run

        write_comparison([Run.published(run) for run in runs], page.path)


if __name__ == "__main__":
    main(compare)
