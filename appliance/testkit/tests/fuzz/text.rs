//! What people type: tokens, names, ids.

use srn_core::ids::{CheckpointId, EpochId, GroupId, NodeId};
use srn_core::name::Name;
use srn_core::token::Token;
use srn_testkit::fuzz::{Target, run, unsealed};

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn tokens() {
    let token = Token::new(*b"fifteen secrets");
    let lower = token.reveal().to_lowercase().replace('-', " ");
    let target = Target {
        name: "tokens",
        corpus: texts(&[&token.reveal(), &lower]),
        seal: unsealed,
        cap: 1 << 16,
    };
    run(&target, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        let Ok(token) = Token::parse(&text) else { return };
        assert!(Token::parse(&token.reveal()).is_ok_and(|again| again == token));
    });
}

#[test]
fn names_and_ids() {
    let id = "0123456789abcdef0123456789abcdef";
    let target = Target {
        name: "names",
        corpus: texts(&["web", "node-a.example_1", &"a".repeat(63), id, &id.repeat(2)]),
        seal: unsealed,
        cap: 24 << 20,
    };
    run(&target, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        if let Ok(name) = text.parse::<Name>() {
            assert!((1..=63).contains(&name.as_str().len()));
            assert_eq!(name.as_str(), text);
        }
        if let Ok(id) = text.parse::<GroupId>() {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        let _ = text.parse::<EpochId>();
        let _ = text.parse::<CheckpointId>();
        if let Ok(id) = text.parse::<NodeId>() {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
    });
}
