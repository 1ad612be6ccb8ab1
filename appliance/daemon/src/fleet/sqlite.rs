//! The node's memory in SQLite: one file, every change synced.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{EventRecord, Fleet, GroupRecord, PeerRecord, RecoveryRecord};
use crate::error::{Failure, Kind, Result};

/// Version of the schema. A database with a higher one was written by a newer program.
const SCHEMA: i64 = 1;

/// Events that are kept.
const EVENTS_MAX: i64 = 10_000;

/// A database file.
#[derive(Debug)]
pub struct SqliteFleet {
    connection: Mutex<Connection>,
}

fn failed(error: &rusqlite::Error) -> Failure {
    let kind = match error.sqlite_error_code() {
        Some(
            rusqlite::ErrorCode::DiskFull
            | rusqlite::ErrorCode::ReadOnly
            | rusqlite::ErrorCode::SystemIoFailure
            | rusqlite::ErrorCode::DatabaseCorrupt
            | rusqlite::ErrorCode::NotADatabase
            | rusqlite::ErrorCode::CannotOpen,
        ) => Kind::Storage,
        _ => Kind::Internal,
    };
    let way_out = match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => "; make room on the state volume",
        Some(rusqlite::ErrorCode::ReadOnly) => "; mount the state volume writable",
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            "; restore it from a backup"
        }
        _ => "",
    };
    Failure::new(kind, format!("the node's memory (fleet.db): {error}{way_out}"))
}

impl SqliteFleet {
    /// Opens the database, making it if it is not there.
    ///
    /// # Errors
    /// When it cannot be opened, or was written by a newer program.
    pub fn open(path: &Path) -> Result<Self> {
        let connection = Connection::open(path).map_err(|error| failed(&error))?;
        let setup = || {
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "full")?;
            connection.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))
        };
        let found = setup().map_err(|error| failed(&error))?;
        if found > SCHEMA {
            return Err(Failure::refused(format!(
                "{} was written by a newer version of srn (format {found}, this one knows \
                 {SCHEMA}); update srn",
                path.display()
            )));
        }
        connection
            .execute_batch(&format!(
                "BEGIN;
                 CREATE TABLE IF NOT EXISTS peer (id TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT;
                 CREATE TABLE IF NOT EXISTS grp (id TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT;
                 CREATE TABLE IF NOT EXISTS recovery (id TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT;
                 CREATE TABLE IF NOT EXISTS event (
                     number INTEGER PRIMARY KEY AUTOINCREMENT, json TEXT NOT NULL) STRICT;
                 PRAGMA user_version = {SCHEMA};
                 COMMIT;"
            ))
            .map_err(|error| failed(&error))?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all<T: DeserializeOwned>(&self, query: &str) -> Result<Vec<T>> {
        let connection = self.lock();
        let read = || {
            let mut statement = connection.prepare(query)?;
            let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
            rows.collect::<std::result::Result<Vec<String>, _>>()
        };
        let rows = read().map_err(|error| failed(&error))?;
        rows.iter()
            .map(|json| {
                serde_json::from_str(json).map_err(|error| {
                    Failure::new(Kind::Storage, format!("the node's memory (fleet.db): {error}"))
                })
            })
            .collect()
    }

    fn put<T: Serialize>(&self, table: &str, id: &str, thing: &T) -> Result<()> {
        let json = serde_json::to_string(thing)
            .map_err(|error| Failure::internal(format!("encoding for fleet.db: {error}")))?;
        self.lock()
            .execute(
                &format!("INSERT OR REPLACE INTO {table} (id, json) VALUES (?1, ?2)"),
                params![id, json],
            )
            .map(|_| ())
            .map_err(|error| failed(&error))
    }

    fn remove(&self, table: &str, id: &str) -> Result<()> {
        self.lock()
            .execute(&format!("DELETE FROM {table} WHERE id = ?1"), params![id])
            .map(|_| ())
            .map_err(|error| failed(&error))
    }
}

impl Fleet for SqliteFleet {
    fn peers(&self) -> Result<Vec<PeerRecord>> {
        self.all("SELECT json FROM peer ORDER BY id")
    }

    fn put_peer(&self, peer: &PeerRecord) -> Result<()> {
        self.put("peer", &peer.id, peer)
    }

    fn remove_peer(&self, id: &str) -> Result<()> {
        self.remove("peer", id)
    }

    fn groups(&self) -> Result<Vec<GroupRecord>> {
        self.all("SELECT json FROM grp ORDER BY id")
    }

    fn put_group(&self, group: &GroupRecord) -> Result<()> {
        self.put("grp", &group.id, group)
    }

    fn remove_group(&self, id: &str) -> Result<()> {
        self.remove("grp", id)
    }

    fn recoveries(&self) -> Result<Vec<RecoveryRecord>> {
        self.all("SELECT json FROM recovery ORDER BY id")
    }

    fn put_recovery(&self, recovery: &RecoveryRecord) -> Result<()> {
        self.put("recovery", &recovery.id, recovery)
    }

    fn remove_recovery(&self, id: &str) -> Result<()> {
        self.remove("recovery", id)
    }

    fn add_event(&self, event: &EventRecord) -> Result<()> {
        let json = serde_json::to_string(event)
            .map_err(|error| Failure::internal(format!("encoding for fleet.db: {error}")))?;
        let connection = self.lock();
        let add = || {
            connection.execute("INSERT INTO event (json) VALUES (?1)", params![json])?;
            connection.execute(
                "DELETE FROM event WHERE number <= (SELECT MAX(number) FROM event) - ?1",
                params![EVENTS_MAX],
            )
        };
        add().map(|_| ()).map_err(|error| failed(&error))
    }

    fn events(&self, most: usize) -> Result<Vec<EventRecord>> {
        self.all(&format!("SELECT json FROM event ORDER BY number DESC LIMIT {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(id: &str) -> PeerRecord {
        PeerRecord { id: id.into(), name: "p".into(), address: None, paired_at: 1 }
    }

    #[test]
    fn what_is_put_survives_and_newer_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fleet.db");
        let fleet = SqliteFleet::open(&path).unwrap();
        fleet.put_peer(&peer("b")).unwrap();
        fleet.put_peer(&peer("a")).unwrap();
        fleet.remove_peer("b").unwrap();
        drop(fleet);
        let fleet = SqliteFleet::open(&path).unwrap();
        assert_eq!(fleet.peers().unwrap(), [peer("a")]);
        fleet.lock().pragma_update(None, "user_version", SCHEMA + 1).unwrap();
        drop(fleet);
        let error = SqliteFleet::open(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Refused);
        assert!(error.message.contains("newer version"), "{error}");
    }

    #[test]
    fn no_database_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fleet.db");
        std::fs::write(&path, [7; 8192]).unwrap();
        assert_eq!(SqliteFleet::open(&path).unwrap_err().kind, Kind::Storage);
    }

    #[test]
    fn events_come_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = SqliteFleet::open(&dir.path().join("fleet.db")).unwrap();
        for at in 0..5 {
            let text = format!("event {at}");
            fleet
                .add_event(&EventRecord { at, level: super::super::Level::Info, group: None, text })
                .unwrap();
        }
        let texts: Vec<i64> = fleet.events(2).unwrap().iter().map(|event| event.at).collect();
        assert_eq!(texts, [4, 3]);
    }
}
