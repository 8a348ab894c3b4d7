"""`corral certs ...`: create and show the certificate of `corral serve --tls`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deployments.launch.certificates import Certificate

app = typer.Typer(help="The certificate of 'corral serve --tls': create, show.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def create(
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="host name that clients use, besides localhost; repeatable"),
    ] = None,
    days: Annotated[int, typer.Option(help="validity, at most 825")] = 825,
    as_json: _Json = False,
) -> None:
    """Create a self-signed certificate and its key under CORRAL_HOME/certs; existing ones are never overwritten."""
    from deployments.launch.certificates import create_certificate

    _print(create_certificate(host or [], days), as_json)


@app.command()
def show(as_json: _Json = False) -> None:
    """Show the certificate's hosts, expiry and fingerprint."""
    from deployments.launch.certificates import certificate_files, read_certificate

    _print(read_certificate(certificate_files()[0]), as_json)


def _print(certificate: "Certificate", as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(certificate), "days_left": certificate.days_left}, indent=2, default=str))
    else:
        print(f"certificate  {certificate.path}")
        print(f"subject      {certificate.subject}")
        print(f"hosts        {', '.join(certificate.hosts)}")
        print(f"valid until  {certificate.not_after:%Y-%m-%d %H:%M} UTC, {certificate.days_left} days left")
        print(f"SHA-256      {certificate.fingerprint}")
        print(f"to trust it  corral chat --ca {certificate.path}, curl --cacert, SSL_CERT_FILE for openai")
    if certificate.warning:
        print(f"warning: {certificate.warning}: move its files away and run 'corral certs create'", file=sys.stderr)
