"""The self-signed certificate of `corral serve --tls`, created once and kept under CORRAL_HOME/certs.

It is its own root and cannot sign others, so trusting the file means trusting this server and nothing else. Knows
nothing of what serves with it.
"""

import datetime
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deployments.errors import CertificateError
from training.home import corral_home

MAX_DAYS = 825  # Apple's limit: https://support.apple.com/en-us/103769
WARN_DAYS = 30
_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOST_NAME = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.I)
_MAX_NAME = 64  # characters of a common name, RFC 5280 appendix A


@dataclass(frozen=True, slots=True)
class Certificate:
    """The contents of a certificate file.

    Attributes:
        hosts: names and addresses that it is valid for, in the order of the certificate.
        fingerprint: SHA-256 of the certificate, as browsers and openssl print it.
    """

    path: Path
    subject: str
    hosts: tuple[str, ...]
    not_before: datetime.datetime
    not_after: datetime.datetime
    fingerprint: str

    @property
    def days_left(self) -> int:
        """Full days until it expires; negative once it has expired."""
        return (self.not_after - datetime.datetime.now(datetime.UTC)).days

    @property
    def warning(self) -> str | None:
        """One line if it has expired or expires soon, else None."""
        if self.days_left >= WARN_DAYS:
            return None
        date = f"{self.not_after:%Y-%m-%d}"
        return f"the certificate {self.path} {'expired' if self.days_left < 0 else 'expires'} on {date}"


def certificate_files() -> tuple[Path, Path]:
    """Paths of Corral's certificate and its key."""
    folder = corral_home() / "certs"
    return folder / "cert.pem", folder / "key.pem"


def create_certificate(hosts: Sequence[str] = (), days: int = MAX_DAYS) -> Certificate:
    """Create the certificate for `hosts`, this machine's name and the loopback addresses.

    Only the owner can read the key file, from the moment it exists and whatever the umask.

    Raises:
        CertificateError: a certificate or key exists, a host is not a name or address, or `days` is out of range.
    """
    if not 1 <= days <= MAX_DAYS:
        raise CertificateError(f"{days} days is out of range: give 1 to {MAX_DAYS}, as clients reject longer validity")
    names = [_general_name(host) for host in hosts]
    machine = socket.gethostname()
    local = (machine, *_LOCAL) if _HOST_NAME.fullmatch(machine) else _LOCAL
    names = list(dict.fromkeys([*names, *map(_general_name, local)]))

    certificate_file, key_file = certificate_files()
    for path in (certificate_file, key_file):
        if path.exists():
            raise CertificateError(
                f"{path} exists and is never overwritten: 'corral certs show' describes it; "
                f"to create a new one, move {certificate_file.name} and {key_file.name} away first"
            )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key, f"Corral on {machine}"[:_MAX_NAME], names, days)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificate_file.parent.mkdir(mode=0o700, exist_ok=True)
    certificate_file.parent.chmod(0o700)
    try:
        _write_new(key_file, key_pem, 0o600)
        _write_new(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise CertificateError(f"{error.filename} cannot be written: {error.strerror}") from error
    return read_certificate(certificate_file)


def read_certificate(path: Path) -> Certificate:
    """Read the first certificate of a PEM file.

    Raises:
        CertificateError: the file cannot be read or contains no certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError as error:
        raise CertificateError(f"certificate {path} does not exist: create it with 'corral certs create'") from error
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CertificateError(f"{path} contains no PEM certificate: name another file, or move it away") from error
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    return Certificate(
        path,
        certificate.subject.rfc4514_string(),
        tuple(str(name.value) for name in names),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST_NAME.fullmatch(host) or len(host) > 253:
            raise CertificateError(
                f"{host!r} is not a valid host: give a name such as llama.example.org, or an IP address, "
                "without scheme or port"
            ) from None
        return x509.DNSName(host.lower())


def _self_signed(
    key: ec.EllipticCurvePrivateKey, common_name: str, names: list[x509.GeneralName], days: int
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    # Backdated by an hour, for clients whose clocks are behind. The last second is inclusive (RFC 5280, 4.1.2.5).
    start = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(hours=1)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days, seconds=-1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Create a file that never has more permissions than `mode`; fails if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # the umask may have removed bits
        file.write(data)
