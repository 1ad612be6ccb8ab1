//! TLS: who gets in and who does not, with the C clients and servers at the other end.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use srn_nbd::client::{Client, ClientError, ConnectOptions, list_exports};
use srn_nbd::proto::ClientHandshakeError;
use srn_nbd::proto::constants::{option, option_reply};
use srn_nbd::server::Listener;
use srn_nbd::tls::{self, CertificateDer, PrivateKeyDer, ServerTls, TlsError};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::interop_client::exercise;
use crate::support::authority::{Authority, For};
use crate::support::backend::pattern;
use crate::support::{
    Fixture, Process, SIZE, blocking, option_bytes, tool, tool_fails, uri, within,
};

/// The server's authority, and the certificates that are admitted, with their names.
struct Admitted {
    authority: Authority,
    names: Mutex<BTreeMap<Vec<u8>, String>>,
}

impl std::fmt::Debug for Admitted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Admitted")
    }
}

impl tls::Authority for Admitted {
    fn certificate(&self) -> CertificateDer<'static> {
        self.authority.der().clone()
    }

    fn server_certificate(
        &self,
        address: IpAddr,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
        assert_eq!(address, IpAddr::from([127, 0, 0, 1]));
        Ok(self.authority.issue("server", For::Server, false))
    }

    fn name_of(&self, certificate: &[u8]) -> Option<String> {
        self.names.lock().unwrap().get(certificate).cloned()
    }
}

/// A server with a listener that requires TLS, and directories of certificates to try it with.
struct Secure {
    fixture: Fixture,
    address: SocketAddr,
    admitted: Arc<Admitted>,
    directory: TempDir,
}

impl Secure {
    async fn start() -> Self {
        let fixture = Fixture::start().await;
        let authority = Authority::new("ours");
        let admitted = Arc::new(Admitted { authority, names: Mutex::default() });
        let tls = ServerTls::new(Arc::clone(&admitted) as Arc<dyn tls::Authority>).unwrap();
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = Listener::tcp(local, Listener::anywhere()).await.unwrap();
        let address = listener.tcp_address().unwrap();
        fixture.server.listen(listener.requiring_tls(tls));
        let directory = tempfile::tempdir().unwrap();
        let secure = Self { fixture, address, admitted, directory };
        let good = secure.issue("good", &secure.admitted.authority, false);
        secure.admitted.names.lock().unwrap().insert(good, "guest one".to_owned());
        secure
    }

    /// Writes certificates of `authority` to a directory of that name. Returns the certificate.
    fn issue(&self, name: &str, authority: &Authority, expired: bool) -> Vec<u8> {
        let to = self.certificates(name);
        std::fs::create_dir(&to).unwrap();
        authority.write(&to, name, For::Client, expired)
    }

    fn certificates(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn uri(&self, export: &str, certificates: &str) -> String {
        let directory = self.certificates(certificates);
        format!("nbds://{}/{export}?tls-certificates={}", self.address, directory.display())
    }

    async fn client(&self, certificates: &str) -> Result<Client, ClientError> {
        let uri = uri(&self.uri("disk", certificates));
        within("connecting", Client::connect(&uri, &ConnectOptions::default())).await
    }
}

async fn run(name: &'static str, package: &'static str, arguments: Vec<String>) -> String {
    blocking(move || tool(name, package, &refs(&arguments))).await
}

async fn run_fails(name: &'static str, package: &'static str, arguments: Vec<String>) -> String {
    blocking(move || tool_fails(name, package, &refs(&arguments))).await
}

fn refs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// Arguments of QEMU's tools for an export over TLS.
fn qemu(secure: &Secure, certificates: &str) -> (String, String) {
    let directory = secure.certificates(certificates);
    let (host, port) = (secure.address.ip(), secure.address.port());
    (
        format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", directory.display()),
        format!(
            "driver=nbd,server.type=inet,server.host={host},server.port={port},export=disk,\
             tls-creds=tls0"
        ),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_reads_and_writes_over_tls() {
    let secure = Secure::start().await;
    let told = run("nbdinfo", "libnbd-bin", vec!["--size".into(), secure.uri("disk", "good")]);
    assert_eq!(told.await.trim(), SIZE.to_string());
    let list = vec!["--list".into(), secure.uri("", "good")];
    assert!(run("nbdinfo", "libnbd-bin", list).await.contains("export=\"disk\""));

    let (from, to) = (secure.certificates("from"), secure.certificates("to"));
    std::fs::write(&from, pattern(5, 0, SIZE as usize)).unwrap();
    let copy = |from: String, to: String| {
        run("nbdcopy", "libnbd-bin", vec!["--connections=4".into(), from, to])
    };
    copy(from.display().to_string(), secure.uri("disk", "good")).await;
    let plain = secure.fixture.client("disk").await;
    for (mib, expected) in std::fs::read(&from).unwrap().chunks(1 << 20).enumerate() {
        let read = plain.read((mib as u64) << 20, 1 << 20).await.unwrap();
        assert!(read == expected, "what was written over TLS is there, MiB {mib}");
    }
    plain.disconnect().await.unwrap();
    copy(secure.uri("disk", "good"), to.display().to_string()).await;
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_reads_and_writes_over_tls() {
    let secure = Secure::start().await;
    let (object, image) = qemu(&secure, "good");
    let io = vec![
        "--object".to_owned(),
        object.clone(),
        "--image-opts".into(),
        "-c".into(),
        "write -P 0x5a 64k 3M".into(),
        "-c".into(),
        "read -P 0x5a 64k 3M".into(),
        "-c".into(),
        "flush".into(),
        image.clone(),
    ];
    let said = run("qemu-io", "qemu-utils", io).await;
    assert!(!said.contains("Pattern verification failed") && !said.contains("error"), "{said}");
    let read = secure.fixture.client("disk").await.read(64 << 10, 3 << 20).await.unwrap();
    assert!(read.iter().all(|byte| *byte == 0x5a));
    let info = vec!["info".into(), "--object".into(), object, "--image-opts".into(), image];
    assert!(run("qemu-img", "qemu-utils", info).await.contains("virtual size"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_in_who_was_not_let_in() {
    let secure = Secure::start().await;
    let stranger = Authority::new("ours");
    secure.issue("unknown", &secure.admitted.authority, false);
    secure.issue("stranger", &stranger, false);
    let expired = secure.issue("expired", &secure.admitted.authority, true);
    secure.admitted.names.lock().unwrap().insert(expired, "expired".to_owned());
    // Trusts us, and shows nothing.
    std::fs::create_dir(secure.certificates("none")).unwrap();
    let authority = "ca-cert.pem";
    let (from, to) = (secure.certificates("good"), secure.certificates("none"));
    std::fs::copy(from.join(authority), to.join(authority)).unwrap();
    // Trusts us, and shows a stranger's certificate.
    std::fs::copy(from.join(authority), secure.certificates("stranger").join(authority)).unwrap();

    for certificates in ["unknown", "stranger", "expired", "none"] {
        let info = vec!["--size".into(), secure.uri("disk", certificates)];
        run_fails("nbdinfo", "libnbd-bin", info).await;
        let (object, image) = qemu(&secure, certificates);
        let arguments =
            vec!["info".into(), "--object".into(), object, "--image-opts".into(), image];
        run_fails("qemu-img", "qemu-utils", arguments).await;
        let error = secure.client(certificates).await.unwrap_err();
        assert!(matches!(error, ClientError::TlsFailed(_)), "{certificates}: {error:?}");
    }
    let plain = format!("nbd://{}/disk", secure.address);
    let said = run_fails("nbdinfo", "libnbd-bin", vec![plain.clone()]).await;
    assert!(said.to_lowercase().contains("tls"), "{said}");
    let error = Client::connect(&uri(&plain), &ConnectOptions::default()).await.unwrap_err();
    let required = matches!(error, ClientError::Handshake(ClientHandshakeError::TlsRequired));
    assert!(required, "{error:?}");
    assert_eq!(secure.fixture.opened(), 0, "nobody has opened anything");

    // The other way round: a client does not talk to a server it cannot trust, or without TLS.
    let plain = secure.fixture.tcp_uri("disk").replace("nbd://", "nbds://");
    let plain = format!("{plain}?tls-certificates={}", from.display());
    let error = Client::connect(&uri(&plain), &ConnectOptions::default()).await.unwrap_err();
    let refused = matches!(error, ClientError::Handshake(ClientHandshakeError::TlsRefused(_)));
    assert!(refused, "{error:?}");
    secure.issue("deceived", &stranger, false);
    let error = secure.client("deceived").await.unwrap_err();
    assert!(matches!(error, ClientError::TlsFailed(_)), "{error:?}");
    let named = format!("{}&tls-hostname=elsewhere", secure.uri("disk", "good"));
    let error = Client::connect(&uri(&named), &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::TlsFailed(_)), "CVE-2024-7383: {error:?}");
    secure.fixture.assert_healthy().await;
    secure.client("good").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_over_tls_loses_nothing() {
    let secure = Secure::start().await;
    let client = secure.client("good").await.unwrap();
    let names: Vec<_> = secure.fixture.server.connections();
    assert_eq!(names[0].client.name.as_deref(), Some("guest one"));
    exercise(&client, "our_client_over_tls_loses_nothing").await;
    // More than any buffer between the two holds, in both directions at once.
    let data = pattern(9, 0, 1 << 20);
    let tasks: Vec<_> = (0..SIZE >> 20)
        .flat_map(|mib| {
            let (client, reader, data) = (client.clone(), client.clone(), data.clone());
            let write = tokio::spawn(async move {
                client.write(mib << 20, data, false).await.unwrap();
            });
            let read = tokio::spawn(async move {
                reader.read(mib << 20, 1 << 20).await.unwrap();
            });
            [write, read]
        })
        .collect();
    for task in tasks {
        within("reading and writing", task).await.unwrap();
    }
    for mib in 0..SIZE >> 20 {
        assert!(client.read(mib << 20, 1 << 20).await.unwrap() == data, "{mib}");
    }
    let listed = list_exports(&uri(&secure.uri("", "good")), &ConnectOptions::default()).await;
    assert!(listed.unwrap().iter().any(|export| export.name == "disk"));
    client.disconnect().await.unwrap();
}

/// A certificate that is taken back lets nobody in again, and who is in can be found by the name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_can_be_taken_back() {
    let secure = Secure::start().await;
    let client = secure.client("good").await.unwrap();
    secure.admitted.names.lock().unwrap().clear();
    assert!(secure.client("good").await.is_err(), "no session is resumed past it");
    let found = secure.fixture.server.connections();
    let found = found.iter().find(|status| status.client.name.as_deref() == Some("guest one"));
    assert!(secure.fixture.server.disconnect(found.unwrap().client.connection));
    within("ending", async { while client.read(0, 512).await.is_ok() {} }).await;
}

/// CVE-2021-3716 on the wire: plain text that follows the wish for TLS in the same packet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_text_behind_starttls_ends_the_connection() {
    let secure = Secure::start().await;
    let mut stream = tokio::net::TcpStream::connect(secure.address).await.unwrap();
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend_from_slice(&option_bytes(option::STARTTLS, &[]));
    bytes.extend_from_slice(&option_bytes(option::LIST, &[]));
    stream.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is as good as an end.
    let _ = within("the end", stream.read_to_end(&mut answer)).await;
    assert_eq!(answer.len(), 18 + 20, "greeting and one answer: {answer:?}");
    assert_eq!(answer[18 + 12..18 + 16], option_reply::ACK.to_be_bytes());
    assert_eq!(secure.fixture.opened(), 0);
    secure.fixture.assert_healthy().await;
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_against_c_servers_with_tls() {
    let authority = Authority::new("theirs");
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["server", "client"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    authority.write(&path("server"), "server", For::Server, false);
    authority.write(&path("client"), "client", For::Client, false);
    Authority::new("other").write(directory.path(), "other", For::Client, false);
    std::fs::copy(path("server/ca-cert.pem"), path("ca-cert.pem")).unwrap();
    std::fs::write(path("image"), vec![0; 16 << 20]).unwrap();
    let shown = |name: &str| path(name).display().to_string();

    for server in ["qemu-nbd", "nbdkit"] {
        let port = free_port();
        let arguments = match server {
            "qemu-nbd" => vec![
                "--persistent".to_owned(),
                "--shared=8".into(),
                "--object".into(),
                format!(
                    "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}",
                    shown("server")
                ),
                "--tls-creds=tls0".into(),
                "--bind=127.0.0.1".into(),
                format!("--port={port}"),
                "--format=raw".into(),
                shown("image"),
            ],
            _ => vec![
                "--foreground".to_owned(),
                "--tls=require".into(),
                "--tls-verify-peer".into(),
                format!("--tls-certificates={}", shown("server")),
                "--ipaddr=127.0.0.1".into(),
                format!("--port={port}"),
                "memory".into(),
                "16M".into(),
            ],
        };
        let package = if server == "nbdkit" { "nbdkit" } else { "qemu-utils" };
        let process = blocking(move || {
            let arguments = refs(&arguments);
            Process::serving_tcp(server, package, &arguments, port)
        })
        .await;
        let connect = |certificates: String| async move {
            let uri = uri(&format!("nbds://127.0.0.1:{port}/?tls-certificates={certificates}"));
            within("connecting", Client::connect(&uri, &ConnectOptions::default())).await
        };
        let client = connect(shown("client")).await.unwrap();
        exercise(&client, "our_client_against_c_servers_with_tls").await;
        client.disconnect().await.unwrap();
        // GnuTLS may close without telling why; what counts is that nothing is had.
        connect(directory.path().display().to_string()).await.unwrap_err();
        let plain = uri(&format!("nbd://127.0.0.1:{port}/"));
        let error = Client::connect(&plain, &ConnectOptions::default()).await.unwrap_err();
        let required = matches!(error, ClientError::Handshake(ClientHandshakeError::TlsRequired));
        assert!(required, "{server}: {error:?}");
        drop(process);
    }
}
