"""The command `underpass`. Commands that only look are nouns; modules load when first needed."""

import importlib
from collections.abc import Mapping
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from agent.cli.reach import RUN_DIR, Where, complete_node

# Name -> where the command is, and its line in the list of commands. A command whose module
# isn't installed isn't listed.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "agent": ("agent.cli.agent:agent", "Run this node's agent and its data plane."),
    "bypass": ("agent.cli.bypass:bypass", "Wanted in the mesh but past it, and why."),
    "certificates": ("agent.cli.look:certificates", "Certificates of this node's identities."),
    "completion": ("agent.cli.completion:completion", "Shell completion: bash, zsh, fish."),
    "connections": ("agent.cli.connections:connections", "Live connections of this node's pods."),
    "controlplane": ("agent.cli.controlplane:controlplane", "Run the embedded control plane."),
    "cut-precapture": (
        "agent.cli.cut_precapture:cut_precapture",
        "Cut connections older than their pod's capture.",
    ),
    "demo": ("agent.cli.demo.commands:demo", "Two nodes and six pods on this machine, proved."),
    "dump": ("agent.cli.dump:dump", "Everything this node knows, as JSON."),
    "explain": ("agent.cli.explain:explain", "What would happen to a connection, and why."),
    "log": ("agent.cli.log:log", "Log levels of both processes, shown or changed live."),
    "pods": ("agent.cli.look:pods", "Pods of this node: captured and proved so, or why not."),
    "policies": ("agent.cli.policies:policies", "Authorization policies and their hits."),
    "services": ("agent.cli.services:services", "Services this node knows."),
    "status": ("agent.cli.status:status", "One screen: what works, what doesn't, what to do."),
    "trace": ("agent.cli.trace:trace", "Connections, drops, DNS and latency of pods, live."),
    "uninstall": ("agent.cli.uninstall:uninstall", "Remove all that a node has on this machine."),
    "version": ("agent.cli.version:version", "Versions of this program and its parts."),
    "why": ("agent.cli.why:why", "The last refusals and failures, and what to do."),
    "workloads": ("agent.cli.look:workloads", "Workloads this node knows."),
}


class Commands(click.Group):
    """Imports a command's module when the command is used, so that `status` starts quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """From the table: importing every command for a key press would be felt."""
        found = [
            CompletionItem(name, help=help)
            for name, (_, help) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        # Options, which a group completes by itself when asked for them.
        return found if not incomplete.startswith("-") else super().shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--node",
    envvar="UNDERPASS_NODE",
    help="The node to ask, where several are here.",
    shell_complete=complete_node,
)
@click.option(
    "--run-dir",
    envvar="UNDERPASS_RUN_DIR",
    type=click.Path(path_type=Path),
    default=RUN_DIR,
    show_default=True,
    help="Folder of the nodes' sockets.",
)
@click.pass_context
def main(context: click.Context, node: str | None, run_dir: Path) -> None:
    """Underpass: carries the traffic of a node's pods over mutual TLS, by workload identity."""
    context.obj = Where(node, run_dir)


if __name__ == "__main__":
    main(prog_name="underpass")
