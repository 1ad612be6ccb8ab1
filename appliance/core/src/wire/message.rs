//! The messages of the control stream.

use alloc::string::String;
use alloc::vec::Vec;

use super::{Integrity, Place, VERSION, Wanted, WireError, put_text, text};
use crate::bytes::{Reader, Writer};
use crate::epoch::{Epoch, EpochTable, Position};
use crate::ids::{CheckpointId, DiskId, DiskNo, EpochId, FrameHash, GroupId, Seq};
use crate::limits::{DISK_SECTORS_MAX, DISKS_MAX, EPOCHS_MAX, MESSAGE_MAX};
use crate::name::Name;
use crate::time::{LogTime, WallTime};

/// First bytes of a [`Hello`]; with the version behind them they never change, so that any two
/// versions can at least tell each other apart.
const HELLO_MAGIC: [u8; 4] = *b"SRNh";

/// A message of the control stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The first message on either side.
    Hello(Hello),
    /// Primary to secondary: this is the group and its history; where shall I go on?
    Offer(Offer),
    /// Secondary to primary: go on behind this position.
    Accept(Accept),
    /// Either node: this group cannot be replicated between us now.
    Refuse(Refuse),
    /// Secondary to primary: every frame up to here is durable.
    Ack {
        /// The group.
        group: GroupId,
        /// The last durable frame.
        seq: Seq,
    },
    /// Secondary to primary: so many bytes of frames may be sent in this stream, in all.
    Credit {
        /// The group.
        group: GroupId,
        /// Bytes since the stream began.
        limit: u64,
    },
    /// Primary to secondary: how far the primary is.
    Progress(Progress),
    /// Secondary to primary: what hinders it from taking frames; empty when nothing does.
    Hindrance {
        /// The group.
        group: GroupId,
        /// In words.
        text: String,
    },
    /// Secondary to primary: stop taking writes, send everything, then say `Drained`.
    Drain {
        /// The group.
        group: GroupId,
    },
    /// Primary to secondary: no write will be answered in this epoch any more, and this is its
    /// last frame.
    Drained {
        /// The group.
        group: GroupId,
        /// The last frame.
        last: Position,
    },
    /// Secondary to primary: make a checkpoint now.
    MarkRequest {
        /// The group.
        group: GroupId,
        /// The id it shall have.
        id: CheckpointId,
    },
    /// Primary to secondary: what there is to say of a checkpoint that is not in the log.
    Note(CheckpointNote),
    /// Secondary to primary: what it lacks of leaves whose hashes it was told.
    Wanted(Wanted),
    /// Either node: a question about content that both hold, an answer, or a word about it.
    Integrity(Integrity),
    /// The node removes this pairing, or goes down on purpose; the reason in words.
    Goodbye {
        /// Whether the pairing is over.
        unpaired: bool,
        /// In words.
        text: String,
    },
}

/// What a primary says of a checkpoint. It can ask for more to be kept, never for less: the
/// secondary alone decides what it deletes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointNote {
    /// The group.
    pub group: GroupId,
    /// The checkpoint.
    pub id: CheckpointId,
    /// A person's label; empty for none.
    pub label: String,
    /// A person asks that it is never retired.
    pub pin: bool,
    /// The applications turned out not to have been quiet, whatever its mark says.
    pub unquiet: bool,
}

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The node's name, for people.
    pub name: Name,
    /// Its software version, for people.
    pub software: String,
    /// Its wall clock, to tell how far the two clocks are apart.
    pub wall_time: WallTime,
}

/// A primary offers to go on with a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub name: Name,
    /// Chosen anew for each offer; the frame stream that follows carries it.
    pub nonce: u64,
    /// The line of epochs.
    pub epochs: EpochTable,
    /// The newest durable frame.
    pub head: Position,
    /// The oldest frame that can still be sent.
    pub oldest: Seq,
    /// Whether the primary has a copy of the disks: then it can also send what changed, without the
    /// frames.
    pub has_copy: bool,
    /// The disks, for display until the log has been read.
    pub disks: Vec<OfferedDisk>,
}

/// A disk as an offer shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedDisk {
    /// Its number in the group.
    pub no: DiskNo,
    /// Its identity.
    pub id: DiskId,
    /// Its size in sectors.
    pub sectors: u64,
    /// Its name.
    pub name: Name,
}

/// A secondary accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The group.
    pub group: GroupId,
    /// The offer's nonce.
    pub nonce: u64,
    /// The last frame that is durable here; frames behind it are wanted.
    pub position: Position,
    /// Bytes of frames, or of changes, that may be sent at first.
    pub credit: u64,
    /// Contents are to be compared, whatever the log holds: a person asks for it.
    pub compare: bool,
    /// What it has been taking in without frames, if that can go on.
    pub under: Option<Under>,
}

/// Taking in what changed was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Under {
    /// The position that it leads to.
    pub to: Position,
    /// Everything before this place has been taken in.
    pub next: Place,
}

/// Why a group is not replicated. The codes are part of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefuseCode {
    /// The refusing node has gone on in a newer epoch: the other one is fenced.
    Fenced,
    /// The two histories differ and neither continues the other.
    Diverged,
    /// The group is paused at the refusing node.
    Paused,
    /// The refusing node cannot store it (full, failed, too many groups).
    Storage,
    /// The group's name belongs to another group there.
    NameTaken,
    /// The refusing node has deleted the group.
    Deleted,
    /// The primary no longer has the frames that the secondary needs.
    TooFarBehind,
    /// The primary was asked to drain, and goes on instead.
    NotDrained,
    /// The refusing secondary holds newer history of this line than the primary offers: the primary
    /// was set back.
    Ahead,
}

impl RefuseCode {
    const ALL: [Self; 9] = [
        Self::Fenced,
        Self::Diverged,
        Self::Paused,
        Self::Storage,
        Self::NameTaken,
        Self::Deleted,
        Self::TooFarBehind,
        Self::NotDrained,
        Self::Ahead,
    ];

    const fn code(self) -> u8 {
        match self {
            Self::Fenced => 1,
            Self::Diverged => 2,
            Self::Paused => 3,
            Self::Storage => 4,
            Self::NameTaken => 5,
            Self::Deleted => 6,
            Self::TooFarBehind => 7,
            Self::NotDrained => 8,
            Self::Ahead => 9,
        }
    }
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// The group.
    pub group: GroupId,
    /// Why.
    pub code: RefuseCode,
    /// Why, in words, with the way out.
    pub text: String,
    /// The refusing node's line of epochs, as the proof of [`RefuseCode::Fenced`].
    pub epochs: Option<EpochTable>,
}

/// How far the primary is. The secondary shows it; nothing is decided by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The group.
    pub group: GroupId,
    /// The newest durable frame at the primary.
    pub head: Seq,
    /// Its log time.
    pub log_time: LogTime,
    /// Its wall time.
    pub wall_time: WallTime,
    /// Bytes in the log which the secondary has not acknowledged.
    pub behind_bytes: u64,
    /// Age of the oldest frame not acknowledged, in microseconds.
    pub behind_us: u64,
    /// The group's state there, in words.
    pub state: String,
}

const HELLO: u8 = 1;
const OFFER: u8 = 2;
const ACCEPT: u8 = 3;
const REFUSE: u8 = 4;
const ACK: u8 = 5;
const CREDIT: u8 = 6;
const PROGRESS: u8 = 7;
const HINDRANCE: u8 = 8;
const DRAIN: u8 = 9;
const DRAINED: u8 = 10;
const MARK_REQUEST: u8 = 11;
const GOODBYE: u8 = 12;
const NOTE: u8 = 13;
const WANTED: u8 = 14;

impl Message {
    /// The group it is about; none for messages about the session.
    #[must_use]
    pub const fn group(&self) -> Option<GroupId> {
        match self {
            Self::Hello(_) | Self::Goodbye { .. } => None,
            Self::Offer(offer) => Some(offer.group),
            Self::Accept(accept) => Some(accept.group),
            Self::Refuse(refuse) => Some(refuse.group),
            Self::Progress(progress) => Some(progress.group),
            Self::Integrity(integrity) => Some(integrity.group),
            Self::Ack { group, .. }
            | Self::Credit { group, .. }
            | Self::Hindrance { group, .. }
            | Self::Drain { group }
            | Self::Drained { group, .. }
            | Self::MarkRequest { group, .. } => Some(*group),
            Self::Note(note) => Some(note.group),
            Self::Wanted(wanted) => Some(wanted.group),
        }
    }

    /// The message with its length prefix.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.put_u32(0);
        out.put_u8(0);
        let kind = self.encode_body(&mut out);
        let len = u32::try_from(out.len() - super::PREFIX_LEN).unwrap_or(u32::MAX);
        if let Some([prefix @ .., to_kind]) = out.first_chunk_mut::<5>() {
            *prefix = len.to_le_bytes();
            *to_kind = kind;
        }
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Hello(hello) => {
                out.put(&HELLO_MAGIC);
                out.put_u16(VERSION);
                put_text(out, hello.name.as_str());
                put_text(out, &hello.software);
                out.put_i64(hello.wall_time.0);
                HELLO
            }
            Self::Offer(offer) => {
                out.put(&offer.group.0);
                put_text(out, offer.name.as_str());
                out.put_u64(offer.nonce);
                put_epochs(out, &offer.epochs);
                put_position(out, &offer.head);
                out.put_u64(offer.oldest.0);
                out.put_u8(u8::from(offer.has_copy));
                out.put_u16(u16::try_from(offer.disks.len()).unwrap_or(u16::MAX));
                for disk in &offer.disks {
                    out.put_u32(disk.no.0);
                    out.put(&disk.id.0);
                    out.put_u64(disk.sectors);
                    put_text(out, disk.name.as_str());
                }
                OFFER
            }
            Self::Accept(accept) => {
                out.put(&accept.group.0);
                out.put_u64(accept.nonce);
                put_position(out, &accept.position);
                out.put_u64(accept.credit);
                out.put_u8(u8::from(accept.compare));
                out.put_u8(u8::from(accept.under.is_some()));
                if let Some(under) = &accept.under {
                    put_position(out, &under.to);
                    out.put_u32(under.next.disk.0);
                    out.put_u64(under.next.sector);
                }
                ACCEPT
            }
            Self::Refuse(refuse) => {
                out.put(&refuse.group.0);
                out.put_u8(refuse.code.code());
                put_text(out, &refuse.text);
                out.put_u8(u8::from(refuse.epochs.is_some()));
                if let Some(epochs) = &refuse.epochs {
                    put_epochs(out, epochs);
                }
                REFUSE
            }
            Self::Ack { group, seq } => {
                out.put(&group.0);
                out.put_u64(seq.0);
                ACK
            }
            Self::Credit { group, limit } => {
                out.put(&group.0);
                out.put_u64(*limit);
                CREDIT
            }
            Self::Progress(progress) => {
                out.put(&progress.group.0);
                out.put_u64(progress.head.0);
                out.put_u64(progress.log_time.0);
                out.put_i64(progress.wall_time.0);
                out.put_u64(progress.behind_bytes);
                out.put_u64(progress.behind_us);
                put_text(out, &progress.state);
                PROGRESS
            }
            Self::Hindrance { group, text } => {
                out.put(&group.0);
                put_text(out, text);
                HINDRANCE
            }
            Self::Drain { group } => {
                out.put(&group.0);
                DRAIN
            }
            Self::Drained { group, last } => {
                out.put(&group.0);
                put_position(out, last);
                DRAINED
            }
            Self::MarkRequest { group, id } => {
                out.put(&group.0);
                out.put(&id.0);
                MARK_REQUEST
            }
            Self::Note(note) => {
                out.put(&note.group.0);
                out.put(&note.id.0);
                out.put_u8(u8::from(note.pin));
                out.put_u8(u8::from(note.unquiet));
                put_text(out, &note.label);
                NOTE
            }
            Self::Wanted(wanted) => {
                wanted.encode(out);
                WANTED
            }
            Self::Integrity(integrity) => integrity.encode(out),
            Self::Goodbye { unpaired, text } => {
                out.put_u8(u8::from(*unpaired));
                put_text(out, text);
                GOODBYE
            }
        }
    }

    /// The length of a message (type and body) from its prefix.
    ///
    /// # Errors
    /// [`WireError::TooLong`] beyond [`MESSAGE_MAX`]; [`WireError::OutOfRange`] for zero.
    pub fn len_from_prefix(prefix: [u8; super::PREFIX_LEN]) -> Result<usize, WireError> {
        let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
        match len {
            0 => Err(WireError::OutOfRange("message length")),
            len if len > MESSAGE_MAX => Err(WireError::TooLong(len)),
            len => Ok(len),
        }
    }

    /// Reads a message without its prefix; `bytes` is all of it.
    ///
    /// # Errors
    /// [`WireError`]: the peer broke the protocol, or speaks another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u8()?;
        let message = decode_body(kind, &mut reader)?;
        if reader.is_empty() { Ok(message) } else { Err(WireError::Trailing(reader.remaining())) }
    }
}

fn decode_body(kind: u8, reader: &mut Reader<'_>) -> Result<Message, WireError> {
    Ok(match kind {
        HELLO => {
            if reader.array()? != HELLO_MAGIC {
                return Err(WireError::OutOfRange("magic number of the hello"));
            }
            match reader.u16()? {
                VERSION => {}
                theirs => return Err(WireError::Version { theirs }),
            }
            Message::Hello(Hello {
                name: name(reader)?,
                software: text(reader)?,
                wall_time: WallTime(reader.i64()?),
            })
        }
        OFFER => Message::Offer(Offer {
            group: GroupId(reader.array()?),
            name: name(reader)?,
            nonce: reader.u64()?,
            epochs: epochs(reader)?,
            head: position(reader)?,
            oldest: Seq(reader.u64()?),
            has_copy: flag(reader)?,
            disks: disks(reader)?,
        }),
        ACCEPT => Message::Accept(Accept {
            group: GroupId(reader.array()?),
            nonce: reader.u64()?,
            position: position(reader)?,
            credit: reader.u64()?,
            compare: flag(reader)?,
            under: if flag(reader)? { Some(under(reader)?) } else { None },
        }),
        REFUSE => {
            let group = GroupId(reader.array()?);
            let code = reader.u8()?;
            let code = *RefuseCode::ALL
                .iter()
                .find(|known| known.code() == code)
                .ok_or(WireError::OutOfRange("refusal"))?;
            let text = text(reader)?;
            let epochs = if flag(reader)? { Some(epochs(reader)?) } else { None };
            Message::Refuse(Refuse { group, code, text, epochs })
        }
        ACK => Message::Ack { group: GroupId(reader.array()?), seq: Seq(reader.u64()?) },
        CREDIT => Message::Credit { group: GroupId(reader.array()?), limit: reader.u64()? },
        PROGRESS => Message::Progress(Progress {
            group: GroupId(reader.array()?),
            head: Seq(reader.u64()?),
            log_time: LogTime(reader.u64()?),
            wall_time: WallTime(reader.i64()?),
            behind_bytes: reader.u64()?,
            behind_us: reader.u64()?,
            state: text(reader)?,
        }),
        HINDRANCE => Message::Hindrance { group: GroupId(reader.array()?), text: text(reader)? },
        DRAIN => Message::Drain { group: GroupId(reader.array()?) },
        DRAINED => Message::Drained { group: GroupId(reader.array()?), last: position(reader)? },
        MARK_REQUEST => Message::MarkRequest {
            group: GroupId(reader.array()?),
            id: CheckpointId(reader.array()?),
        },
        NOTE => Message::Note(CheckpointNote {
            group: GroupId(reader.array()?),
            id: CheckpointId(reader.array()?),
            pin: flag(reader)?,
            unquiet: flag(reader)?,
            label: text(reader)?,
        }),
        WANTED => Message::Wanted(Wanted::decode(reader)?),
        GOODBYE => Message::Goodbye { unpaired: flag(reader)?, text: text(reader)? },
        other if Integrity::is_kind(other) => Message::Integrity(Integrity::decode(other, reader)?),
        other => return Err(WireError::UnknownType(other)),
    })
}

pub(super) fn put_position(out: &mut Vec<u8>, position: &Position) {
    out.put(&position.epoch.0);
    out.put_u64(position.seq.0);
    out.put(&position.hash.0);
}

pub(super) fn position(reader: &mut Reader<'_>) -> Result<Position, WireError> {
    Ok(Position {
        epoch: EpochId(reader.array()?),
        seq: Seq(reader.u64()?),
        hash: FrameHash(reader.array()?),
    })
}

fn under(reader: &mut Reader<'_>) -> Result<Under, WireError> {
    let to = position(reader)?;
    let next = Place { disk: DiskNo(reader.u32()?), sector: reader.u64()? };
    if next.sector > DISK_SECTORS_MAX {
        return Err(WireError::OutOfRange("place to go on"));
    }
    Ok(Under { to, next })
}

fn put_epochs(out: &mut Vec<u8>, table: &EpochTable) {
    out.put_u16(u16::try_from(table.list().len()).unwrap_or(u16::MAX));
    for epoch in table.list() {
        out.put(&epoch.id.0);
        put_position(out, &epoch.forked_from);
    }
}

fn epochs(reader: &mut Reader<'_>) -> Result<EpochTable, WireError> {
    let count = usize::from(reader.u16()?);
    if count > EPOCHS_MAX {
        return Err(WireError::OutOfRange("number of epochs"));
    }
    let mut epochs = Vec::new();
    for _ in 0..count {
        epochs.push(Epoch { id: EpochId(reader.array()?), forked_from: position(reader)? });
    }
    EpochTable::from_list(epochs).map_err(|_| WireError::OutOfRange("epoch table"))
}

fn disks(reader: &mut Reader<'_>) -> Result<Vec<OfferedDisk>, WireError> {
    let count = usize::from(reader.u16()?);
    if count > DISKS_MAX {
        return Err(WireError::OutOfRange("number of disks"));
    }
    let mut disks = Vec::new();
    for _ in 0..count {
        disks.push(OfferedDisk {
            no: DiskNo(reader.u32()?),
            id: DiskId(reader.array()?),
            sectors: reader.u64()?,
            name: name(reader)?,
        });
    }
    Ok(disks)
}

fn name(reader: &mut Reader<'_>) -> Result<Name, WireError> {
    text(reader)?.parse().map_err(|_| WireError::OutOfRange("name"))
}

pub(super) fn flag(reader: &mut Reader<'_>) -> Result<bool, WireError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(WireError::OutOfRange("flag")),
    }
}
