"""flashd jobs and flashd show: what the daemon was asked, and what it answered."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from flashd.cli.needs import check_appliance
from flashd.cli.options import Jobs, Show, SpoolOptions
from flashd.cli.printing import cost_in_words
from flashd.errors import InputMissing


def jobs(options: Jobs) -> None:
    """Lists the latest jobs."""
    import msgspec

    from flashd.daemon import spool

    jobs = spool.read_latest(_spool(options), options.most)
    if options.json:
        print(msgspec.json.encode(jobs).decode())
        return
    for job in jobs:
        when = datetime.fromtimestamp(job.created).strftime("%Y-%m-%d %H:%M:%S")
        text = " ".join(job.result.text.split())
        print(f"{job.id:6}  {when}  {job.state:9}  {job.request.source:20}  {text[:60]}")


def show(options: Show) -> None:
    """Shows one job."""
    import msgspec

    from flashd.daemon import spool

    path = _spool(options)
    job = spool.read_one(path, options.number)
    if job is None:
        raise InputMissing(f"{path}: there is no job {options.number}; flashd jobs lists those there are")
    if options.json:
        print(msgspec.json.encode(job).decode())
        return
    for turn in (*job.request.turns, *job.result.steps):
        print(f"{turn.role}: {turn.content}")
        for call in turn.calls:
            print(f"calls {call.name} {call.arguments}")
    if job.result.thoughts:
        print(f"thoughts: {job.result.thoughts}")
    print(f"{job.state} ({job.result.finish}): {job.result.text}")
    for call in job.result.calls:
        print(f"calls {call.name} {call.arguments}")
    for choice, probability in job.result.probabilities.items():
        print(f"{probability:9.4f} {choice}")
    if job.result.figures:
        print(cost_in_words(job.result.finish, job.result.figures))


def _spool(options: SpoolOptions) -> Path:
    """The file that the jobs are in."""
    if options.spool:
        return options.spool
    check_appliance()
    from flashd.config.settings import load

    return Path(load(options.config).spool.path)
