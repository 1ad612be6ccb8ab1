//! The payloads of options, and replies to options: parsing and encoding, no state.
//!
//! Used by both handshake machines; which option is legal when is theirs to know.

use bytes::BufMut;

use super::constants::{
    OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_MAX, info as info_type, option_reply,
};
use super::export::{ExportInfo, ExportSummary};
use super::wire::{Fields, truncate_text};

/// Length of the header of an option and of an option reply, in bytes.
pub(crate) const OPTION_HEADER_BYTES: usize = 16;
pub(crate) const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// Text sent to people beside an error is cut to this many bytes.
const MESSAGE_MAX: usize = 256;

/// Why the payload of an option was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedOption {
    /// A length reaches past the payload, or bytes are left over.
    #[error("lengths do not add up")]
    Lengths,
    /// A string is not UTF-8 or has a NUL in it.
    #[error("string is not text")]
    Text,
    /// A string is longer than 4096 bytes.
    #[error("string is longer than 4096 bytes")]
    LongString,
    /// The option takes no payload and had one.
    #[error("unexpected payload")]
    Unexpected,
}

/// The payload of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: String,
    pub(crate) wants_name: bool,
    pub(crate) wants_description: bool,
}

impl InfoRequest {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, MalformedOption> {
        let mut fields = Fields::new(payload);
        let name = take_string(&mut fields)?;
        let count = fields.take_u16().ok_or(MalformedOption::Lengths)?;
        let mut request = Self { name, wants_name: false, wants_description: false };
        for _ in 0..count {
            match fields.take_u16().ok_or(MalformedOption::Lengths)? {
                info_type::NAME => request.wants_name = true,
                info_type::DESCRIPTION => request.wants_description = true,
                // Size and block sizes are sent unasked; others the document bids us ignore.
                _ => {}
            }
        }
        if fields.is_empty() { Ok(request) } else { Err(MalformedOption::Lengths) }
    }

    /// Encodes the request of a client that wants to know all there is.
    pub(crate) fn encode(name: &str, out: &mut Vec<u8>) {
        put_string(out, name);
        out.put_u16(3);
        out.put_u16(info_type::BLOCK_SIZE);
        out.put_u16(info_type::NAME);
        out.put_u16(info_type::DESCRIPTION);
    }
}

/// The payload of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContextRequest {
    pub(crate) name: String,
    /// Whether there was any query at all: none has a meaning of its own.
    pub(crate) any_query: bool,
    /// Whether `base:allocation` was asked for by its full name.
    pub(crate) allocation: bool,
    /// Whether the whole `base:` namespace was asked for.
    pub(crate) base_wildcard: bool,
}

impl ContextRequest {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, MalformedOption> {
        let mut fields = Fields::new(payload);
        let name = take_string(&mut fields)?;
        let count = fields.take_u32().ok_or(MalformedOption::Lengths)?;
        let mut request =
            Self { name, any_query: count > 0, allocation: false, base_wildcard: false };
        // Each query takes at least four bytes of the payload, so a lying count ends the loop.
        for _ in 0..count {
            match take_string(&mut fields)?.as_str() {
                super::constants::BASE_ALLOCATION => request.allocation = true,
                "base:" => request.base_wildcard = true,
                // Strange namespaces and strange leaves are ignored, as the document demands.
                _ => {}
            }
        }
        if fields.is_empty() { Ok(request) } else { Err(MalformedOption::Lengths) }
    }

    pub(crate) fn encode(name: &str, queries: &[String], out: &mut Vec<u8>) {
        put_string(out, name);
        out.put_u32(u32::try_from(queries.len()).unwrap_or(u32::MAX));
        for query in queries {
            put_string(out, query);
        }
    }
}

/// A payload that is nothing but an export name.
pub(crate) fn parse_name(payload: &[u8]) -> Result<String, MalformedOption> {
    if payload.len() > STRING_MAX {
        return Err(MalformedOption::LongString);
    }
    let text = std::str::from_utf8(payload).map_err(|_| MalformedOption::Text)?;
    if text.contains('\0') { Err(MalformedOption::Text) } else { Ok(text.to_owned()) }
}

fn take_string(fields: &mut Fields<'_>) -> Result<String, MalformedOption> {
    let length = fields.take_u32().ok_or(MalformedOption::Lengths)?;
    parse_name(fields.take_bytes_u32(length).ok_or(MalformedOption::Lengths)?)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    let text = truncate_text(text, STRING_MAX);
    out.put_u32(wire_length(text.len()));
    out.put_slice(text.as_bytes());
}

/// Lengths here are of strings of at most 4096 bytes and fixed fields around them.
fn wire_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Encodes an option header; `body` writes the payload.
pub(crate) fn put_option(out: &mut Vec<u8>, option: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let mut payload = Vec::new();
    body(&mut payload);
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_u32(wire_length(payload.len()));
    out.put_slice(&payload);
}

fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[&[u8]]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(wire_length(payload.iter().map(|part| part.len()).sum()));
    for part in payload {
        out.put_slice(part);
    }
}

pub(crate) fn put_ack(out: &mut Vec<u8>, option: u32) {
    put_reply(out, option, option_reply::ACK, &[]);
}

pub(crate) fn put_error(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    put_reply(out, option, kind, &[truncate_text(message, MESSAGE_MAX).as_bytes()]);
}

pub(crate) fn put_server(out: &mut Vec<u8>, option: u32, export: &ExportSummary) {
    let description = truncate_text(&export.description, STRING_MAX);
    let length = wire_length(export.name.len()).to_be_bytes();
    let payload: [&[u8]; 3] = [&length, export.name.as_bytes(), description.as_bytes()];
    put_reply(out, option, option_reply::SERVER, &payload);
}

pub(crate) fn put_context(out: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    put_reply(out, option, option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
}

/// Encodes all information about an export that was asked for, and what is always sent.
pub(crate) fn put_export_info(
    out: &mut Vec<u8>,
    option: u32,
    request: &InfoRequest,
    info: &ExportInfo,
    structured: bool,
) {
    let mut put = |kind: u16, parts: &[&[u8]]| {
        let kind = kind.to_be_bytes();
        let mut payload: Vec<&[u8]> = vec![&kind];
        payload.extend_from_slice(parts);
        put_reply(out, option, option_reply::INFO, &payload);
    };
    let flags = info.transmission_flags(structured).to_be_bytes();
    put(info_type::EXPORT, &[&info.size.to_be_bytes(), &flags]);
    // An empty name asks for the default export; which one that is, is not ours to say.
    if request.wants_name && !request.name.is_empty() {
        put(info_type::NAME, &[request.name.as_bytes()]);
    }
    if request.wants_description && !info.description.is_empty() {
        put(info_type::DESCRIPTION, &[info.description.as_bytes()]);
    }
    let sizes = info.block_sizes;
    let sizes = [sizes.minimum, sizes.preferred, sizes.maximum].map(u32::to_be_bytes);
    put(info_type::BLOCK_SIZE, &[sizes.as_flattened()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn info_request_round_trip() {
        let mut bytes = Vec::new();
        InfoRequest::encode("disk0", &mut bytes);
        let parsed = InfoRequest::parse(&bytes).unwrap();
        assert_eq!(
            parsed,
            InfoRequest { name: "disk0".into(), wants_name: true, wants_description: true }
        );
    }

    #[test]
    fn info_requests_that_lie_are_refused() {
        let cases: &[(&[&[u8]], MalformedOption)] = &[
            (&[b""], MalformedOption::Lengths),
            (&[&[0, 0, 0]], MalformedOption::Lengths),
            (&[&[0, 0, 0, 4], b"abc"], MalformedOption::Lengths),
            (&[&[0xff; 4], b"abc", &[0, 0]], MalformedOption::Lengths),
            (&[&[0, 0, 0, 3], b"abc"], MalformedOption::Lengths),
            (&[&[0, 0, 0, 3], b"abc", &[0, 1]], MalformedOption::Lengths),
            (&[&[0, 0, 0, 3], b"abc", &[0, 0], &[0]], MalformedOption::Lengths),
            (&[&[0, 0, 0, 2], &[0xc3, 0x28], &[0, 0]], MalformedOption::Text),
            (&[&[0, 0, 0, 2], b"a\0", &[0, 0]], MalformedOption::Text),
            (&[&[0, 0, 0x10, 1], &[b'a'; 4097], &[0, 0]], MalformedOption::LongString),
        ];
        for (parts, expected) in cases {
            assert_eq!(InfoRequest::parse(&payload(parts)), Err(*expected), "{parts:02x?}");
        }
        let longest = payload(&[&[0, 0, 0x10, 0], &[b'a'; 4096], &[0, 0]]);
        assert_eq!(InfoRequest::parse(&longest).unwrap().name.len(), 4096);
    }

    #[test]
    fn context_requests() {
        let parse = |queries: &[&str]| {
            let mut bytes = Vec::new();
            let queries: Vec<_> = queries.iter().map(|query| (*query).to_owned()).collect();
            ContextRequest::encode("d", &queries, &mut bytes);
            let parsed = ContextRequest::parse(&bytes).unwrap();
            (parsed.any_query, parsed.allocation, parsed.base_wildcard)
        };
        assert_eq!(parse(&[]), (false, false, false));
        assert_eq!(parse(&["base:allocation"]), (true, true, false));
        assert_eq!(parse(&["base:"]), (true, false, true));
        assert_eq!(parse(&["qemu:dirty-bitmap:b", "base:depth", ""]), (true, false, false));
        assert_eq!(parse(&["x-a:b", "base:allocation", "base:"]), (true, true, true));
    }

    #[test]
    fn context_requests_that_lie_are_refused() {
        let cases: &[&[&[u8]]] = &[
            &[&[0, 0, 0, 1], b"d"],
            &[&[0, 0, 0, 1], b"d", &[0, 0, 0, 1]],
            &[&[0, 0, 0, 1], b"d", &[0xff, 0xff, 0xff, 0xff]],
            &[&[0, 0, 0, 1], b"d", &[0, 0, 0, 1], &[0, 0, 0, 9], b"base:"],
            &[&[0, 0, 0, 1], b"d", &[0, 0, 0, 0], b"x"],
        ];
        for parts in cases {
            let parsed = ContextRequest::parse(&payload(parts));
            assert_eq!(parsed, Err(MalformedOption::Lengths), "{parts:02x?}");
        }
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let mut out = Vec::new();
        put_error(&mut out, 7, option_reply::ERR_POLICY, &"\u{e9}".repeat(4000));
        assert_eq!(out.len(), OPTION_REPLY_HEADER_BYTES + MESSAGE_MAX);
        assert!(std::str::from_utf8(&out[OPTION_REPLY_HEADER_BYTES..]).is_ok());
    }
}
