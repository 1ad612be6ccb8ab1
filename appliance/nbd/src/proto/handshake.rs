//! The server's half of the fixed newstyle handshake: bytes in, bytes and questions out.
//!
//! The machine knows no exports: where it needs one it returns an [`Event`] and waits for the
//! matching [`Answer`]. It knows no clock either: the caller ends a handshake that takes too long.
//! Nor does it know TLS: it says when the transport is to be secured, and is told when that is done.
//!
//! ```text
//!            flags            option                      GO / EXPORT_NAME answered well
//! (greeting) -----> Options <--------> Asking(question) ---------------------------> Finished
//!                      |  ^
//!             too long |  | payload consumed, refused
//!                      v  |
//!                   Discarding
//! ```
//! Where TLS is required, nothing but `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` is heard before it, and
//! nothing that was said before it is remembered: who sits between client and server could have said
//! it (CVE-2021-3716). There is no mode in which a client may choose.

use bytes::{Buf, BufMut, BytesMut};

use super::constants::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, NBD_MAGIC, OPTION_MAGIC, STRING_MAX, handshake_flag,
    option, option_reply,
};
use super::export::{ExportInfo, ExportSummary, OpenError};
use super::option::{
    ContextRequest, InfoRequest, MalformedOption, OPTION_HEADER_BYTES, parse_name, put_ack,
    put_context, put_error, put_export_info, put_server,
};
use super::wire::Fields;

/// The id `base:allocation` has on every connection that selected it.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// How much a client may ask of a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandshakeLimits {
    /// Options of one connection. Listing tools send two for each export.
    pub options: u32,
    /// Payload of one option in bytes; a longer one is consumed and refused.
    pub option_bytes: u32,
    /// Payload of all options of one connection in bytes; past it the connection is dropped.
    pub total_bytes: u64,
}

impl Default for HandshakeLimits {
    /// 2048 options, 64 KiB each (room for sixteen context names of full length), 4 MiB in all.
    fn default() -> Self {
        Self { options: 2048, option_bytes: 64 << 10, total_bytes: 4 << 20 }
    }
}

/// What the machine needs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// More bytes of the client.
    NeedInput,
    /// [`Answer::List`].
    List,
    /// [`Answer::Described`] for the export of this name, which must not be opened for it.
    Describe(String),
    /// [`Answer::Opened`] for the export of this name.
    Open(String),
    /// TLS: send the output, secure the transport, then call [`Handshake::secured`].
    StartTls,
    /// Nothing: the client ended the negotiation. Send the output and close.
    Aborted,
}

/// What the caller answers to an [`Event`].
#[derive(Debug)]
pub enum Answer<'a> {
    /// To [`Event::List`].
    List(&'a [ExportSummary]),
    /// To [`Event::Describe`].
    Described(Result<&'a ExportInfo, &'a OpenError>),
    /// To [`Event::Open`].
    Opened(Result<&'a ExportInfo, &'a OpenError>),
}

/// What was agreed when the transmission phase begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The export as the client saw it.
    pub export: ExportInfo,
    /// Structured replies were agreed.
    pub structured: bool,
    /// `base:allocation` was selected for this export.
    pub allocation: bool,
}

/// Why a handshake is at an end; the connection is to be dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The client set flags nobody offered.
    #[error("client sent unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// The client does not speak NBD, or lost its place.
    #[error("client sent {0:#018x} where an option should start")]
    OptionMagic(u64),
    /// More options than [`HandshakeLimits::options`].
    #[error("client sent more than {0} options")]
    TooManyOptions(u32),
    /// More bytes than [`HandshakeLimits::total_bytes`].
    #[error("client sent more than {0} bytes of option payload")]
    TooManyBytes(u64),
    /// `NBD_OPT_EXPORT_NAME` cannot be refused in any other way.
    #[error("client asked by export name: {0}")]
    Refused(OpenError),
    /// The name in `NBD_OPT_EXPORT_NAME` was no name.
    #[error("client sent a malformed export name: {0}")]
    ExportName(MalformedOption),
    /// The client sent more in plain text where TLS was to begin: nobody knows who wrote that.
    #[error("client sent plain text behind its wish to start TLS")]
    PlainText,
    /// TLS is required, and the client asked for an export without it in a way that cannot be
    /// refused otherwise.
    #[error("client asked for an export without TLS, which is required")]
    NotSecured,
    /// The caller answered something that was not asked: our own fault.
    #[error("answer does not fit the question")]
    Misuse,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Options,
    /// Consuming a payload too long to look at; then `option` is refused.
    Discarding {
        option: u32,
        remaining: usize,
    },
    Asking(Question),
    Securing,
    Finished,
}

/// Whether this connection is, or has to be, secured by TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Off,
    Required,
    Secured,
}

#[derive(Debug)]
enum Question {
    List,
    Info(InfoRequest),
    Go(InfoRequest),
    ExportName,
    ListContexts(ContextRequest),
    SetContexts(ContextRequest),
}

/// The machine; see the module's description.
#[derive(Debug)]
pub struct Handshake {
    limits: HandshakeLimits,
    state: State,
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// The export `base:allocation` was last selected for.
    allocation_of: Option<String>,
    options_seen: u32,
    bytes_seen: u64,
    /// The name in the question asked last.
    asked: String,
}

impl Handshake {
    /// Starts a handshake and writes the greeting to `out`.
    pub fn new(limits: HandshakeLimits, out: &mut Vec<u8>) -> Self {
        out.put_u64(NBD_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        Self {
            limits,
            state: State::ClientFlags,
            tls: Tls::Off,
            no_zeroes: false,
            structured: false,
            allocation_of: None,
            options_seen: 0,
            bytes_seen: 0,
            asked: String::new(),
        }
    }

    /// As [`Handshake::new`], for a client that gets nothing before it has started TLS.
    pub fn requiring_tls(limits: HandshakeLimits, out: &mut Vec<u8>) -> Self {
        Self { tls: Tls::Required, ..Self::new(limits, out) }
    }

    /// The transport is secured, as [`Event::StartTls`] asked for. Without that event it does
    /// nothing.
    pub fn secured(&mut self) {
        if matches!(self.state, State::Securing) {
            self.state = State::Options;
            self.tls = Tls::Secured;
            // What an attacker may have said in the client's name has no effect. (The counters of
            // options and bytes are kept: they bound what one connection costs.)
            self.structured = false;
            self.allocation_of = None;
            self.asked.clear();
        }
    }

    /// Consumes as much of `input` as makes sense, appends replies to `out` and says what is
    /// needed next. Whatever is left in `input` after the end of the handshake belongs to the
    /// transmission phase.
    ///
    /// # Errors
    /// See [`HandshakeError`]; what is in `out` should still be sent.
    pub fn step(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
    ) -> Result<Event, HandshakeError> {
        loop {
            match &mut self.state {
                State::ClientFlags => {
                    let Some(flags) = Fields::new(input).take_u32() else {
                        return Ok(Event::NeedInput);
                    };
                    input.advance(4);
                    self.accept_flags(flags)?;
                }
                State::Options => {
                    if let Some(event) = self.take_option(input, out)? {
                        if event == Event::StartTls && !input.is_empty() {
                            return Err(HandshakeError::PlainText);
                        }
                        return Ok(event);
                    }
                }
                State::Discarding { option, remaining } => {
                    let now = input.len().min(*remaining);
                    input.advance(now);
                    *remaining -= now;
                    if *remaining > 0 {
                        return Ok(Event::NeedInput);
                    }
                    put_error(out, *option, option_reply::ERR_TOO_BIG, "option is too long");
                    self.state = State::Options;
                }
                State::Asking(_) | State::Securing | State::Finished => {
                    return Err(HandshakeError::Misuse);
                }
            }
        }
    }

    /// Answers the question of the last event. A session comes back when the client entered the
    /// transmission phase.
    ///
    /// # Errors
    /// [`HandshakeError::Refused`] when a refusal cannot be told to the client,
    /// [`HandshakeError::Misuse`] when the answer is to another question.
    pub fn answer(
        &mut self,
        answer: Answer<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Option<Session>, HandshakeError> {
        let question = match std::mem::replace(&mut self.state, State::Options) {
            State::Asking(question) => question,
            other => {
                self.state = other;
                return Err(HandshakeError::Misuse);
            }
        };
        match (question, answer) {
            (Question::List, Answer::List(exports)) => {
                for export in exports.iter().filter(|export| export.name.len() <= STRING_MAX) {
                    put_server(out, option::LIST, export);
                }
                put_ack(out, option::LIST);
                Ok(None)
            }
            (Question::Info(request), Answer::Described(result)) => {
                self.put_information(option::INFO, &request, result, out);
                Ok(None)
            }
            (Question::Go(request), Answer::Opened(result)) => {
                let info = self.put_information(option::GO, &request, result, out);
                Ok(info.map(|info| self.finish(info)))
            }
            (Question::ExportName, Answer::Opened(result)) => {
                let info = result.map_err(|error| HandshakeError::Refused(error.clone()))?;
                out.put_u64(info.size);
                out.put_u16(info.transmission_flags(self.structured));
                if !self.no_zeroes {
                    out.put_bytes(0, EXPORT_NAME_PADDING);
                }
                Ok(Some(self.finish(info)))
            }
            (Question::ListContexts(request), Answer::Described(result)) => {
                // No query at all asks for everything there is.
                let wanted = !request.any_query || request.allocation || request.base_wildcard;
                put_contexts(option::LIST_META_CONTEXT, 0, wanted, result, out);
                Ok(None)
            }
            (Question::SetContexts(request), Answer::Described(result)) => {
                let (id, option) = (ALLOCATION_CONTEXT_ID, option::SET_META_CONTEXT);
                if put_contexts(option, id, request.allocation, result, out) {
                    self.allocation_of = Some(request.name);
                }
                Ok(None)
            }
            (question, _) => {
                self.state = State::Asking(question);
                Err(HandshakeError::Misuse)
            }
        }
    }

    fn accept_flags(&mut self, flags: u32) -> Result<(), HandshakeError> {
        let offered = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        if flags & !u32::from(offered) != 0 {
            return Err(HandshakeError::UnknownFlags(flags));
        }
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Options;
        Ok(())
    }

    /// Takes one option off `input`. `None` means "go on".
    fn take_option(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
    ) -> Result<Option<Event>, HandshakeError> {
        let Some((magic, option, length)) = parse_option_header(input) else {
            return Ok(Some(Event::NeedInput));
        };
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::OptionMagic(magic));
        }
        if self.options_seen >= self.limits.options {
            return Err(HandshakeError::TooManyOptions(self.limits.options));
        }
        if self.bytes_seen.saturating_add(length as u64) > self.limits.total_bytes {
            return Err(HandshakeError::TooManyBytes(self.limits.total_bytes));
        }
        let too_long = length > self.limits.option_bytes as usize;
        if too_long && option == option::EXPORT_NAME {
            return Err(HandshakeError::ExportName(MalformedOption::LongString));
        }
        if !too_long && input.len() - OPTION_HEADER_BYTES < length {
            return Ok(Some(Event::NeedInput));
        }
        self.options_seen += 1;
        self.bytes_seen += length as u64;
        input.advance(OPTION_HEADER_BYTES);
        if too_long {
            self.state = State::Discarding { option, remaining: length };
            return Ok(None);
        }
        let payload = input.split_to(length);
        self.take_payload(option, &payload, out)
    }

    fn take_payload(
        &mut self,
        option: u32,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event>, HandshakeError> {
        match (self.tls, option) {
            (_, option::ABORT) => {}
            (_, option::STARTTLS) => return Ok(self.take_starttls(payload, out)),
            (Tls::Required, option::EXPORT_NAME) => return Err(HandshakeError::NotSecured),
            (Tls::Required, _) => {
                let message = "this server speaks of exports only over TLS";
                put_error(out, option, option_reply::ERR_TLS_REQD, message);
                return Ok(None);
            }
            (Tls::Off | Tls::Secured, _) => {}
        }
        let asked = match option {
            option::EXPORT_NAME => {
                self.asked = parse_name(payload).map_err(HandshakeError::ExportName)?;
                Ok(Question::ExportName)
            }
            option::ABORT => {
                put_ack(out, option);
                self.state = State::Finished;
                return Ok(Some(Event::Aborted));
            }
            option::LIST if payload.is_empty() => Ok(Question::List),
            option::STRUCTURED_REPLY if payload.is_empty() => {
                self.structured = true;
                put_ack(out, option);
                return Ok(None);
            }
            option::LIST | option::STRUCTURED_REPLY => Err(MalformedOption::Unexpected),
            option::INFO => InfoRequest::parse(payload).map(Question::Info),
            option::GO => InfoRequest::parse(payload).map(Question::Go),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if option == option::SET_META_CONTEXT {
                    // Every such option replaces the selection, even one that fails.
                    self.allocation_of = None;
                }
                if !self.structured {
                    let message = "structured replies must be negotiated first";
                    put_error(out, option, option_reply::ERR_INVALID, message);
                    return Ok(None);
                }
                ContextRequest::parse(payload).map(if option == option::SET_META_CONTEXT {
                    Question::SetContexts
                } else {
                    Question::ListContexts
                })
            }
            _ => {
                put_error(out, option, option_reply::ERR_UNSUP, "option is not supported");
                return Ok(None);
            }
        };
        match asked {
            Ok(question) => Ok(Some(self.ask(question))),
            Err(MalformedOption::LongString) => {
                let message = MalformedOption::LongString.to_string();
                put_error(out, option, option_reply::ERR_TOO_BIG, &message);
                Ok(None)
            }
            Err(error) => {
                put_error(out, option, option_reply::ERR_INVALID, &error.to_string());
                Ok(None)
            }
        }
    }

    fn take_starttls(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Option<Event> {
        let (kind, message) = match self.tls {
            _ if !payload.is_empty() => (option_reply::ERR_INVALID, "unexpected payload"),
            Tls::Required => {
                put_ack(out, option::STARTTLS);
                self.state = State::Securing;
                return Some(Event::StartTls);
            }
            Tls::Secured => (option_reply::ERR_INVALID, "TLS was started before"),
            Tls::Off => (option_reply::ERR_POLICY, "this address is served without TLS"),
        };
        put_error(out, option::STARTTLS, kind, message);
        None
    }

    fn ask(&mut self, question: Question) -> Event {
        let event = match &question {
            Question::List => Event::List,
            Question::ExportName => Event::Open(self.asked.clone()),
            Question::Go(request) => {
                self.asked.clone_from(&request.name);
                Event::Open(request.name.clone())
            }
            Question::Info(request) => Event::Describe(request.name.clone()),
            Question::ListContexts(request) | Question::SetContexts(request) => {
                Event::Describe(request.name.clone())
            }
        };
        self.state = State::Asking(question);
        event
    }

    fn put_information<'a>(
        &self,
        option: u32,
        request: &InfoRequest,
        result: Result<&'a ExportInfo, &OpenError>,
        out: &mut Vec<u8>,
    ) -> Option<&'a ExportInfo> {
        match result {
            Ok(info) => {
                put_export_info(out, option, request, info, self.structured);
                put_ack(out, option);
                Some(info)
            }
            Err(error) => {
                put_refusal(out, option, error);
                None
            }
        }
    }

    fn finish(&mut self, info: &ExportInfo) -> Session {
        self.state = State::Finished;
        let allocation =
            info.allocation && self.allocation_of.as_deref() == Some(self.asked.as_str());
        Session { export: info.clone(), structured: self.structured, allocation }
    }
}

/// Magic, option and payload length of the option at the start of `input`.
fn parse_option_header(input: &[u8]) -> Option<(u64, u32, usize)> {
    let mut fields = Fields::new(input);
    let (magic, option) = (fields.take_u64()?, fields.take_u32()?);
    Some((magic, option, usize::try_from(fields.take_u32()?).unwrap_or(usize::MAX)))
}

fn put_refusal(out: &mut Vec<u8>, option: u32, error: &OpenError) {
    let kind = match error {
        OpenError::NotFound | OpenError::Unavailable(_) => option_reply::ERR_UNKNOWN,
        OpenError::Policy(_) | OpenError::Busy(_) => option_reply::ERR_POLICY,
    };
    put_error(out, option, kind, &error.to_string());
}

/// Whether the context was put, that is: wanted and there.
fn put_contexts(
    option: u32,
    id: u32,
    wanted: bool,
    result: Result<&ExportInfo, &OpenError>,
    out: &mut Vec<u8>,
) -> bool {
    match result {
        Ok(info) => {
            let found = wanted && info.allocation;
            if found {
                put_context(out, option, id, BASE_ALLOCATION);
            }
            put_ack(out, option);
            found
        }
        Err(error) => {
            put_refusal(out, option, error);
            false
        }
    }
}
