//! What an administrator writes: configuration, sizes, spans of time, NBD URIs. However mangled, it
//! is refused in words or taken; nothing panics and nothing allocates without bound.

use std::path::Path;

use srn::config::{Config, Size, parse_duration, parse_size};
use srn_nbd::client::Uri;
use srn_testkit::fuzz::{Counting, Target, run, unsealed};

#[global_allocator]
static COUNTING: Counting = Counting;

const CONFIG: &str = r#"
[node]
name = "node-a"
state_dir = "/var/lib/srn"
run_dir = "/run/srn"

[link]
listen = "[::]:7310"

[nbd]
listen = ["127.0.0.1:10809"]
allow = ["10.0.0.0/8", "::1/128"]

[control]
socket = "/run/srn/control.sock"

[store]
segment_size = "64M"

[recovery]
accelerator = "kvm"
memory = "2G"
cpus = 4

[log]
level = "info"
"#;

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn configurations() {
    let short = "[node]\nname = \"a\"\n";
    for text in [CONFIG, short] {
        Config::parse(Path::new("c.toml"), text).expect("the corpus is valid");
    }
    let target = Target {
        name: "configurations",
        corpus: texts(&[CONFIG, short]),
        seal: unsealed,
        cap: 64 << 20,
    };
    run(&target, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        if let Err(error) = Config::parse(Path::new("c.toml"), &text) {
            assert!(error.to_string().starts_with("c.toml"), "{error}");
        }
    });
}

#[test]
fn sizes_and_durations() {
    let target = Target {
        name: "sizes",
        corpus: texts(&["512", "4K", "1 MiB", "2g", "17T", "90s", "1h 30min", "2days", "1.5h"]),
        seal: unsealed,
        cap: 64 << 20,
    };
    run(&target, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        if let Ok(bytes) = parse_size(&text) {
            assert!(!Size(bytes).to_string().is_empty());
        }
        let _ = parse_duration(&text);
    });
}

#[test]
fn nbd_uris() {
    let target = Target {
        name: "uris",
        corpus: texts(&[
            "nbd://127.0.0.1:10809/web/root",
            "nbd://[::1]/export%20name",
            "nbd+unix:///web/root?socket=/run/srn/nbd.sock",
            "nbds://host.example/x?tls-certificates=/etc/pki&tls-hostname=h",
        ]),
        seal: unsealed,
        cap: 64 << 20,
    };
    run(&target, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        let Ok(uri) = text.parse::<Uri>() else { return };
        assert!(uri.export.len() <= 4096 && !uri.export.contains('\0'), "{text:?}");
        assert!(!uri.address.to_string().is_empty(), "{text:?}");
    });
}
