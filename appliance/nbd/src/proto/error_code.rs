//! The errors a request may be answered with.

/// An error number of the protocol ("Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ErrorCode {
    /// `NBD_EPERM`: a write to a read-only export.
    #[error("operation not permitted")]
    NotPermitted,
    /// `NBD_EIO`: the storage failed.
    #[error("input/output error")]
    Io,
    /// `NBD_ENOMEM`: should not be sent if it can be helped.
    #[error("out of memory")]
    NoMemory,
    /// `NBD_EINVAL`: the request breaks a rule.
    #[error("invalid argument")]
    Invalid,
    /// `NBD_ENOSPC`: past the end, or no space is left.
    #[error("no space left on device")]
    NoSpace,
    /// `NBD_EOVERFLOW`: too long for one reply.
    #[error("value too large")]
    Overflow,
    /// `NBD_ENOTSUP`: a FAST_ZERO that would not be fast.
    #[error("operation not supported")]
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is going away.
    #[error("server is shutting down")]
    ShuttingDown,
}

impl ErrorCode {
    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::ShuttingDown => 108,
        }
    }

    /// The error of a number; as the document asks, an unexpected number counts as `EINVAL`.
    #[must_use]
    pub fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::NotPermitted,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::ShuttingDown,
            _ => Self::Invalid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_and_strangers_are_invalid() {
        for number in [1, 5, 12, 22, 28, 75, 95, 108] {
            assert_eq!(ErrorCode::from_wire(number).to_wire(), number);
        }
        assert_eq!(ErrorCode::from_wire(2), ErrorCode::Invalid);
        assert_eq!(ErrorCode::from_wire(u32::MAX), ErrorCode::Invalid);
    }
}
