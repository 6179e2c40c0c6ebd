"""Run `peftctl model` as a user does."""

import json

from peftctl import cli


def run(capsys, *arguments):
    """Run in this process; return (exit code, stdout, stderr)."""
    capsys.readouterr()  # what making the target has printed
    code = cli.run(["model", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments):
    """Return the one line that a command is refused with."""
    code, out, err = run(capsys, *arguments)
    assert code in (1, 2) and out == "" and len(err.strip().splitlines()) == 1, (code, out, err)
    return err
