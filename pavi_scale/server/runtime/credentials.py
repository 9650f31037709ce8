"""Credentials of one run: a certificate authority that exists for its length, and one certificate signed with it."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from distributed import Security

DAYS = 366


@dataclass(frozen=True)
class Credentials:
    """PEM texts that let a process take part in one run.

    Args:
        ca: Certificate of the run's authority; who has none signed by it is refused.
        cert: Certificate of the run's processes.
        key: Their private key.
    """

    ca: str
    cert: str
    key: str

    @classmethod
    def make(cls) -> Credentials:
        """New ones. The authority's own key is forgotten at once: nobody can sign another certificate for this run, not even from a stolen worker."""
        authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        issuer = _name("pavi-scale run")
        root = _certificate(issuer, issuer, authority.public_key(), x509.BasicConstraints(ca=True, path_length=0)).sign(authority, hashes.SHA256())
        leaf = _certificate(_name("pavi-scale process"), issuer, key.public_key(), x509.BasicConstraints(ca=False, path_length=None))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return cls(_pem(root), _pem(leaf.sign(authority, hashes.SHA256())), private)

    def security(self, ca: str | None = None, cert: str | None = None, key: str | None = None) -> Security:
        """As Dask takes them; with files in place of the texts where they are named."""
        fields = {"tls_ca_file": ca or self.ca}
        for role in ("client", "scheduler", "worker"):
            fields |= {f"tls_{role}_cert": cert or self.cert, f"tls_{role}_key": key or self.key}
        return Security(require_encryption=True, **fields)

    @contextlib.contextmanager
    def files(self, directory: Path) -> Iterator[tuple[Path, Security]]:
        """A folder in `directory` that holds them as files that only this user can read, gone afterwards; and `security` that names them."""
        with tempfile.TemporaryDirectory(prefix="pavi-scale-", dir=directory) as folder:  # mode 0700
            paths = {}
            for name in ("ca", "cert", "key"):
                path = Path(folder) / f"{name}.pem"
                path.touch(mode=0o600)
                path.write_text(getattr(self, name))
                paths[name] = str(path)
            yield Path(folder), self.security(**paths)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, constraints: x509.BasicConstraints
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(tz=datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of nodes differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(constraints, critical=True)
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
