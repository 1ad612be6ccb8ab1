//! The client's half of the handshake: bytes in, bytes and a result out.
//!
//! Speaks fixed newstyle and falls back step by step: to simple replies where structured ones are
//! not offered, to `NBD_OPT_EXPORT_NAME` where `NBD_OPT_GO` is not. The server is not trusted:
//! every length has a cap, and what it may send in all has one too. Who wants TLS gets it or
//! nothing: there is no fall-back, and what a server said before TLS is forgotten.

use bytes::{Buf, BufMut, BytesMut};

use super::constants::{
    EXPORT_NAME_PADDING, NBD_MAGIC, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_MAX,
    handshake_flag, info, option, option_reply,
};
use super::export::{BlockSizes, ExportInfo, ExportSummary};
use super::option::{
    ContextRequest, InfoRequest, OPTION_REPLY_HEADER_BYTES, parse_name, put_option,
};
use super::wire::Fields;

/// The longest reply to an option that is looked at: two strings and their fields.
const REPLY_BYTES_MAX: usize = 2 * STRING_MAX + 64;
/// The most replies one handshake may consist of: a list of a hundred thousand exports.
const REPLIES_MAX: u32 = 100_000;
/// The most bytes of replies one handshake may consist of.
const TOTAL_BYTES_MAX: u64 = 64 << 20;

const MALFORMED: ClientHandshakeError =
    ClientHandshakeError::Violation(HandshakeViolation::Malformed);

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// The export to use; empty for the default export.
    pub export: String,
    /// Ask for structured replies (and therefore block status).
    pub structured: bool,
    /// Metadata contexts to select by their full names; at most 16 are asked for.
    pub contexts: Vec<String>,
    /// Start TLS before anything else is said.
    pub tls: bool,
}

/// A selected metadata context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContext {
    /// The id of the connection's status chunks.
    pub id: u32,
    /// The full name.
    pub name: String,
}

/// What was agreed when the transmission phase begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// The export; `allocation` tells whether `base:allocation` was selected.
    pub export: ExportInfo,
    /// The transmission flags as sent.
    pub flags: u16,
    /// The server's own name for the export, if it told.
    pub canonical_name: Option<String>,
    /// Structured replies were agreed.
    pub structured: bool,
    /// The selected metadata contexts.
    pub contexts: Vec<MetaContext>,
}

/// What the machine needs next.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// More bytes of the server.
    NeedInput,
    /// TLS: secure the transport, then go on with [`ClientHandshake::step`].
    StartTls,
    /// Nothing: transmission begins with whatever is left in the input.
    Ready(Box<Negotiated>),
    /// Nothing: the list was asked for and this is it. Send the output and close.
    Listed(Vec<ExportSummary>),
}

/// Why there will be no transmission phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientHandshakeError {
    /// The peer is no NBD server.
    #[error("server greets with {0:#018x}, which is not NBD")]
    NotNbd(u64),
    /// The peer speaks the dialect from before 2011.
    #[error("server speaks only the oldstyle protocol")]
    Oldstyle,
    /// Options need a server that speaks fixed newstyle.
    #[error("server cannot list its exports")]
    CannotList,
    /// The server wants TLS first.
    #[error("server requires TLS; use nbds:// and certificates that it knows")]
    TlsRequired,
    /// We want TLS and the server does not.
    #[error("server does not offer TLS: {0}")]
    TlsRefused(String),
    /// The server knows no such export.
    #[error("export {name:?} is not available: {message}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The server's text.
        message: String,
    },
    /// The server refuses.
    #[error("server refuses export {name:?}: {message}")]
    Refused {
        /// The name asked for.
        name: String,
        /// The server's text or the number of its error.
        message: String,
    },
    /// The server is shutting down.
    #[error("server is shutting down")]
    ShuttingDown,
    /// The server breaks the protocol.
    #[error("server breaks the handshake: {0}")]
    Violation(HandshakeViolation),
}

/// How a server broke the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeViolation {
    /// Something else where a reply to an option should start.
    #[error("no option reply where one should start")]
    ReplyMagic,
    /// A reply to another option than the one sent.
    #[error("reply to an option that was not sent")]
    StrangeOption,
    /// A reply of a type that does not fit the option.
    #[error("reply of a type that does not fit the option")]
    StrangeReply,
    /// A reply longer than any lawful one.
    #[error("reply is too long")]
    LongReply,
    /// Replies without end.
    #[error("too many replies")]
    TooManyReplies,
    /// More in plain text where TLS was to begin.
    #[error("plain text where TLS was to begin")]
    PlainText,
    /// The fields of a reply do not add up, or its text is no text.
    #[error("malformed reply")]
    Malformed,
    /// A size past `i64::MAX`.
    #[error("export has a negative size")]
    NegativeSize,
    /// Block sizes that break the rules.
    #[error("export has unlawful block sizes")]
    BlockSizes,
    /// Accepted without telling the size.
    #[error("export was accepted without its size")]
    NoExportInfo,
    /// A context that was not asked for, or twice.
    #[error("metadata context that was not asked for")]
    StrangeContext,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    StartTls,
    /// By the next step the transport is secured.
    Secured,
    Listing,
    Structured,
    Contexts,
    Go,
    ExportName,
    Finished,
}

/// The machine; see the module's description.
#[derive(Debug)]
pub struct ClientHandshake {
    wish: Wish,
    list_only: bool,
    state: State,
    no_zeroes: bool,
    structured: bool,
    contexts: Vec<MetaContext>,
    exports: Vec<ExportSummary>,
    size_and_flags: Option<(u64, u16)>,
    block_sizes: Option<BlockSizes>,
    canonical_name: Option<String>,
    description: String,
    replies_seen: u32,
    bytes_seen: u64,
}

impl ClientHandshake {
    /// Starts a handshake that ends in transmission.
    #[must_use]
    pub fn new(mut wish: Wish) -> Self {
        wish.contexts.truncate(16);
        Self {
            wish,
            list_only: false,
            state: State::Greeting,
            no_zeroes: false,
            structured: false,
            contexts: Vec::new(),
            exports: Vec::new(),
            size_and_flags: None,
            block_sizes: None,
            canonical_name: None,
            description: String::new(),
            replies_seen: 0,
            bytes_seen: 0,
        }
    }

    /// Starts a handshake that ends with the list of exports, over TLS if so wished.
    #[must_use]
    pub fn list(tls: bool) -> Self {
        let wish = Wish { export: String::new(), structured: false, contexts: Vec::new(), tls };
        Self { list_only: true, ..Self::new(wish) }
    }

    /// Consumes as much of `input` as makes sense, appends options to `out` and says what is
    /// needed next.
    ///
    /// # Errors
    /// See [`ClientHandshakeError`]; the connection is to be dropped.
    pub fn step(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
    ) -> Result<ClientEvent, ClientHandshakeError> {
        loop {
            let progress = match self.state {
                State::Greeting => self.take_greeting(input, out)?,
                State::ExportName => match self.take_export_name_answer(input)? {
                    Some(ready) => return Ok(ready),
                    None => false,
                },
                State::Secured => {
                    self.send_first(out);
                    true
                }
                State::Finished => return Err(violation(HandshakeViolation::StrangeReply)),
                _ => match take_reply(input)? {
                    Some(reply) => {
                        self.count(&reply)?;
                        let securing = self.state == State::StartTls;
                        if securing && reply.kind == option_reply::ACK && !input.is_empty() {
                            return Err(violation(HandshakeViolation::PlainText));
                        }
                        match self.take_reply(&reply, out)? {
                            Some(ClientEvent::StartTls) => return Ok(ClientEvent::StartTls),
                            Some(event) => {
                                self.state = State::Finished;
                                return Ok(event);
                            }
                            None => true,
                        }
                    }
                    None => false,
                },
            };
            if !progress {
                return Ok(ClientEvent::NeedInput);
            }
        }
    }

    fn count(&mut self, reply: &Reply) -> Result<(), ClientHandshakeError> {
        self.replies_seen += 1;
        self.bytes_seen += reply.payload.len() as u64;
        if self.replies_seen > REPLIES_MAX || self.bytes_seen > TOTAL_BYTES_MAX {
            return Err(violation(HandshakeViolation::TooManyReplies));
        }
        Ok(())
    }

    fn take_greeting(
        &mut self,
        input: &mut BytesMut,
        out: &mut Vec<u8>,
    ) -> Result<bool, ClientHandshakeError> {
        let mut fields = Fields::new(input);
        let Some(magic) = fields.take_u64() else { return Ok(false) };
        if magic != NBD_MAGIC {
            return Err(ClientHandshakeError::NotNbd(magic));
        }
        let Some(style) = fields.take_u64() else { return Ok(false) };
        match style {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(ClientHandshakeError::Oldstyle),
            other => return Err(ClientHandshakeError::NotNbd(other)),
        }
        let Some(flags) = fields.take_u16() else { return Ok(false) };
        input.advance(18);
        let known = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        self.no_zeroes = known & handshake_flag::NO_ZEROES != 0;
        out.put_u32(u32::from(known));
        let fixed = known & handshake_flag::FIXED_NEWSTYLE != 0;
        match (fixed, self.list_only) {
            (false, _) if self.wish.tls => {
                let text = "it speaks no fixed newstyle".to_owned();
                return Err(ClientHandshakeError::TlsRefused(text));
            }
            (false, true) => return Err(ClientHandshakeError::CannotList),
            (false, false) => self.send_export_name(out),
            (true, _) if self.wish.tls => {
                put_option(out, option::STARTTLS, |_| {});
                self.state = State::StartTls;
            }
            (true, _) => self.send_first(out),
        }
        Ok(true)
    }

    /// The first option that is about exports.
    fn send_first(&mut self, out: &mut Vec<u8>) {
        if self.list_only {
            put_option(out, option::LIST, |_| {});
            self.state = State::Listing;
        } else if self.wish.structured {
            put_option(out, option::STRUCTURED_REPLY, |_| {});
            self.state = State::Structured;
        } else {
            self.send_go(out);
        }
    }

    fn take_reply(
        &mut self,
        reply: &Reply,
        out: &mut Vec<u8>,
    ) -> Result<Option<ClientEvent>, ClientHandshakeError> {
        let expected = match self.state {
            State::StartTls => option::STARTTLS,
            State::Listing => option::LIST,
            State::Structured => option::STRUCTURED_REPLY,
            State::Contexts => option::SET_META_CONTEXT,
            _ => option::GO,
        };
        if reply.option != expected {
            return Err(violation(HandshakeViolation::StrangeOption));
        }
        let refused = reply.kind & option_reply::ERROR_BIT != 0;
        match self.state {
            State::StartTls => match reply.kind {
                option_reply::ACK => {
                    self.state = State::Secured;
                    Ok(Some(ClientEvent::StartTls))
                }
                option_reply::ERR_SHUTDOWN => Err(self.refusal(reply)),
                _ if refused => Err(ClientHandshakeError::TlsRefused(told(reply))),
                _ => Err(violation(HandshakeViolation::StrangeReply)),
            },
            State::Listing if refused => Err(self.refusal(reply)),
            State::Listing => self.take_list_reply(reply, out),
            State::Structured => {
                match reply.kind {
                    option_reply::ACK => self.structured = true,
                    option_reply::ERR_TLS_REQD | option_reply::ERR_SHUTDOWN => {
                        return Err(self.refusal(reply));
                    }
                    _ if refused => {}
                    _ => return Err(violation(HandshakeViolation::StrangeReply)),
                }
                if self.structured && !self.wish.contexts.is_empty() {
                    self.send_contexts(out);
                } else {
                    self.send_go(out);
                }
                Ok(None)
            }
            State::Contexts => {
                match reply.kind {
                    option_reply::META_CONTEXT => {
                        self.take_context(&reply.payload)?;
                        return Ok(None);
                    }
                    option_reply::ACK => {}
                    _ if refused => self.contexts.clear(),
                    _ => return Err(violation(HandshakeViolation::StrangeReply)),
                }
                self.send_go(out);
                Ok(None)
            }
            _ => self.take_go_reply(reply, out),
        }
    }

    fn take_list_reply(
        &mut self,
        reply: &Reply,
        out: &mut Vec<u8>,
    ) -> Result<Option<ClientEvent>, ClientHandshakeError> {
        match reply.kind {
            option_reply::SERVER => {
                let mut fields = Fields::new(&reply.payload);
                let name = fields.take_u32().and_then(|length| fields.take_bytes_u32(length));
                self.exports.push(ExportSummary {
                    name: text(name.ok_or(MALFORMED)?)?,
                    description: text(fields.rest())?,
                });
                Ok(None)
            }
            option_reply::ACK => {
                put_option(out, option::ABORT, |_| {});
                Ok(Some(ClientEvent::Listed(std::mem::take(&mut self.exports))))
            }
            _ => Err(violation(HandshakeViolation::StrangeReply)),
        }
    }

    fn take_context(&mut self, payload: &[u8]) -> Result<(), ClientHandshakeError> {
        let mut fields = Fields::new(payload);
        let id = fields.take_u32().ok_or(MALFORMED)?;
        let name = text(fields.rest())?;
        let asked = self.wish.contexts.contains(&name);
        if !asked || self.contexts.iter().any(|known| known.id == id || known.name == name) {
            return Err(violation(HandshakeViolation::StrangeContext));
        }
        self.contexts.push(MetaContext { id, name });
        Ok(())
    }

    fn take_go_reply(
        &mut self,
        reply: &Reply,
        out: &mut Vec<u8>,
    ) -> Result<Option<ClientEvent>, ClientHandshakeError> {
        match reply.kind {
            option_reply::INFO => {
                self.take_info(&reply.payload)?;
                Ok(None)
            }
            option_reply::ACK => {
                let missing = violation(HandshakeViolation::NoExportInfo);
                let (size, flags) = self.size_and_flags.ok_or(missing)?;
                self.ready(size, flags).map(Some)
            }
            option_reply::ERR_UNSUP => {
                self.send_export_name(out);
                Ok(None)
            }
            kind if kind & option_reply::ERROR_BIT != 0 => Err(self.refusal(reply)),
            _ => Err(violation(HandshakeViolation::StrangeReply)),
        }
    }

    fn take_info(&mut self, payload: &[u8]) -> Result<(), ClientHandshakeError> {
        let mut fields = Fields::new(payload);
        match fields.take_u16().ok_or(MALFORMED)? {
            info::EXPORT => {
                let pair = fields.take_u64().zip(fields.take_u16());
                if !fields.is_empty() {
                    return Err(MALFORMED);
                }
                self.size_and_flags = Some(pair.ok_or(MALFORMED)?);
            }
            info::BLOCK_SIZE => {
                let mut take = || fields.take_u32().ok_or(MALFORMED);
                let sizes = BlockSizes { minimum: take()?, preferred: take()?, maximum: take()? };
                if !fields.is_empty() {
                    return Err(MALFORMED);
                }
                if !sizes.are_lawful() {
                    return Err(violation(HandshakeViolation::BlockSizes));
                }
                self.block_sizes = Some(sizes);
            }
            info::NAME => self.canonical_name = Some(text(fields.rest())?),
            info::DESCRIPTION => self.description = text(fields.rest())?,
            _ => {}
        }
        Ok(())
    }

    fn take_export_name_answer(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<ClientEvent>, ClientHandshakeError> {
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        let mut fields = Fields::new(input);
        let (Some(size), Some(flags)) = (fields.take_u64(), fields.take_u16()) else {
            return Ok(None);
        };
        if fields.take_bytes(padding).is_none() {
            return Ok(None);
        }
        input.advance(10 + padding);
        self.state = State::Finished;
        self.ready(size, flags).map(Some)
    }

    fn ready(&mut self, size: u64, flags: u16) -> Result<ClientEvent, ClientHandshakeError> {
        if i64::try_from(size).is_err() {
            return Err(violation(HandshakeViolation::NegativeSize));
        }
        let sizes = self.block_sizes.unwrap_or(BlockSizes::UNNEGOTIATED);
        let mut export = ExportInfo::from_wire(size, flags, sizes);
        let allocation = super::constants::BASE_ALLOCATION;
        export.allocation = self.contexts.iter().any(|context| context.name == allocation);
        export.description = std::mem::take(&mut self.description);
        Ok(ClientEvent::Ready(Box::new(Negotiated {
            export,
            flags,
            canonical_name: self.canonical_name.take(),
            structured: self.structured,
            contexts: std::mem::take(&mut self.contexts),
        })))
    }

    fn refusal(&self, reply: &Reply) -> ClientHandshakeError {
        let name = self.wish.export.clone();
        let message = told(reply);
        match reply.kind {
            option_reply::ERR_TLS_REQD => ClientHandshakeError::TlsRequired,
            option_reply::ERR_SHUTDOWN => ClientHandshakeError::ShuttingDown,
            option_reply::ERR_UNKNOWN => ClientHandshakeError::Unknown { name, message },
            _ => ClientHandshakeError::Refused { name, message },
        }
    }

    fn send_contexts(&mut self, out: &mut Vec<u8>) {
        put_option(out, option::SET_META_CONTEXT, |payload| {
            ContextRequest::encode(&self.wish.export, &self.wish.contexts, payload);
        });
        self.state = State::Contexts;
    }

    fn send_go(&mut self, out: &mut Vec<u8>) {
        put_option(out, option::GO, |payload| InfoRequest::encode(&self.wish.export, payload));
        self.state = State::Go;
    }

    fn send_export_name(&mut self, out: &mut Vec<u8>) {
        put_option(out, option::EXPORT_NAME, |payload| {
            payload.put_slice(self.wish.export.as_bytes());
        });
        self.state = State::ExportName;
    }
}

struct Reply {
    option: u32,
    kind: u32,
    payload: BytesMut,
}

fn take_reply(input: &mut BytesMut) -> Result<Option<Reply>, ClientHandshakeError> {
    let mut fields = Fields::new(input);
    let Some(magic) = fields.take_u64() else { return Ok(None) };
    if magic != OPTION_REPLY_MAGIC {
        return Err(violation(HandshakeViolation::ReplyMagic));
    }
    let header = (fields.take_u32(), fields.take_u32(), fields.take_u32());
    let (Some(option), Some(kind), Some(length)) = header else { return Ok(None) };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > REPLY_BYTES_MAX {
        return Err(violation(HandshakeViolation::LongReply));
    }
    if fields.take_bytes(length).is_none() {
        return Ok(None);
    }
    input.advance(OPTION_REPLY_HEADER_BYTES);
    Ok(Some(Reply { option, kind, payload: input.split_to(length) }))
}

/// The server's words for an error, or its number.
fn told(reply: &Reply) -> String {
    match String::from_utf8_lossy(&reply.payload) {
        text if text.is_empty() => format!("error {:#x}", reply.kind),
        text => text.into_owned(),
    }
}

fn text(bytes: &[u8]) -> Result<String, ClientHandshakeError> {
    parse_name(bytes).map_err(|_| MALFORMED)
}

fn violation(violation: HandshakeViolation) -> ClientHandshakeError {
    ClientHandshakeError::Violation(violation)
}
