"""`semisam export` and `semisam verify`: a trained model as a package, and whether a package can be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import errors, readable_errors

console = Console()


def export(
    run: Annotated[Path, typer.Argument(help="The run folder of a completed study.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the package; must not exist.")],
    key: Annotated[Path | None, typer.Option(help="The lead's signing key.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make the signing key first.")] = False,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Leave the package unsigned.")] = False,
    without_onnx: Annotated[bool, typer.Option("--without-onnx", help="Leave ONNX out.")] = False,
    licence: Annotated[Path | None, typer.Option(help="Text file with the licence of the weights.")] = None,
) -> None:
    """Export a study's specialist: a MONAI bundle with TorchScript, ONNX, safetensors, a model card and a signature.

    Example: semisam export runs/atrium -o atrium-model --key release.key --new-key
    """
    with readable_errors(), console.status("") as status:
        from release.export import export as write
        from release.package import fingerprint, read_key
        from release.package import new_key as make_key
        from semisam_core.errors import ConfigError

        if (key is None) != unsigned or (new_key and key is None):
            raise ConfigError("give --key (with --new-key if it is to be made), or --unsigned.")
        if key is not None and new_key:
            make_key(key)
        private = None if key is None else read_key(key)
        card = write(run, out, private, not without_onnx, lambda text: status.update(f"{text} ..."), licence)
    for name, apart in card["differences"].items():
        console.print(f"{name}: probabilities within {apart:.1g} of the specialist's", highlight=False)
    by = "unsigned" if private is None else f"signed by {fingerprint(private.public_key())}"
    console.print(f"{out}: {by}", highlight=False, markup=False, soft_wrap=True)


def verify(
    package: Annotated[Path, typer.Argument(help="The package's folder.")],
    signer: Annotated[
        str | None, typer.Option(help="Fingerprint of the lead's key, or its file, as the lead gave it to you.")
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Run the copies of the network although no --signer is named.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Check a package: every file, the signature, and that all copies of the network answer alike.

    TorchScript and ONNX are programs, so they are run only if --signer made the package, or with --parity.

    Example: semisam verify atrium-model --signer 3f0c...
    """
    with readable_errors(), errors.status("checking ..."):
        from release.export import verify as check

        found = check(package, signer, parity)
    if as_json:
        console.print_json(json.dumps(found))
        return
    console.print(f"{package}: {found['files']} files are as listed.", highlight=False, markup=False, soft_wrap=True)
    for name, apart in found["differences"].items():
        console.print(f"{name}: probabilities within {apart:.1g} of the specialist's", highlight=False)
    if not (found["expected"] or parity):
        console.print("TorchScript and ONNX were not run; --signer or --parity compares them too.")
    if found["signer"] is None:
        console.print("It is not signed: anybody may have made it.")
    elif signer is None:
        console.print(f"Signed by {found['signer']}. Compare this with what the lead told you.", highlight=False)
    else:
        console.print(f"Signed by {found['signer']}, as expected.", highlight=False)
