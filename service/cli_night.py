"""The verbs of the night shift: versions of the policy."""

import typer

from service.console import Json, State, open_record, print_rows

policies_app = typer.Typer(help="The versions of the policy.", no_args_is_help=True)


@policies_app.command("list")
def policies_list(state: State = None, json: Json = False) -> None:
    """All versions of the policy and what became of them."""
    from dataclasses import asdict

    from data import registry

    with open_record(state) as db:
        rows = [asdict(policy) for policy in registry.list_policies(db)]
    columns = ["name", "parent", "status", "created_at"]
    print_rows(rows, json=json, columns=columns, empty="No policies yet: start with `nightshift up`.")
