//! Merging sorted lists of entries, the newer one winning wherever two overlap.

use srn_core::extent::{Extent, Slice};
use srn_core::ids::DiskNo;

use super::Place;
use crate::error::Result;

/// One entry with its disk and extent.
pub type Item = (DiskNo, Extent, Place);

/// Merges inputs, newest first; each must be sorted and without overlaps in itself, and so is the
/// result. It holds one entry of each input in memory.
pub struct Merge<I> {
    inputs: Vec<(I, Option<Item>)>,
}

impl<I> std::fmt::Debug for Merge<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Merge({} inputs)", self.inputs.len())
    }
}

impl<I: Iterator<Item = Result<Item>>> Merge<I> {
    /// Starts merging.
    ///
    /// # Errors
    /// When the first entry of an input cannot be read.
    pub fn new(newest_first: impl IntoIterator<Item = I>) -> Result<Self> {
        let mut inputs = Vec::new();
        for mut input in newest_first {
            let head = input.next().transpose()?;
            inputs.push((input, head));
        }
        Ok(Self { inputs })
    }

    fn step(&mut self) -> Result<Option<Item>> {
        // The first sector that anyone covers; of those that begin there the newest wins.
        let Some((winner, (disk, mut extent, place))) = self
            .inputs
            .iter()
            .enumerate()
            .filter_map(|(at, (_, head))| head.map(|head| (at, head)))
            .min_by_key(|(at, (disk, extent, _))| (*disk, extent.start, *at))
        else {
            return Ok(None);
        };
        // Up to where a newer input begins.
        for (_, head) in self.inputs.iter().take(winner) {
            if let Some((_, newer, _)) = head.filter(|(other, ..)| *other == disk)
                && newer.start < extent.end()
            {
                extent.sectors = newer.start - extent.start;
            }
        }
        for (input, head) in self.inputs.iter_mut().skip(winner) {
            cut(input, head, disk, extent.end())?;
        }
        Ok(Some((disk, extent, place.slice(0, extent.sectors))))
    }
}

/// Drops from an input what lies before `end` of `disk`.
fn cut<I: Iterator<Item = Result<Item>>>(
    input: &mut I,
    head: &mut Option<Item>,
    disk: DiskNo,
    end: u64,
) -> Result<()> {
    while let Some((at, extent, place)) = head
        && *at == disk
        && extent.start < end
    {
        if extent.end() > end {
            let skip = end - extent.start;
            let rest = Extent::new(end, extent.sectors - skip);
            *place = place.slice(skip, rest.sectors);
            *extent = rest;
            return Ok(());
        }
        *head = input.next().transpose()?;
    }
    Ok(())
}

impl<I: Iterator<Item = Result<Item>>> Iterator for Merge<I> {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use srn_core::extent::ExtentMap;
    use srn_core::frame::envelope::Codec;

    fn place(write: u32, sectors: u64) -> Place {
        Place::Block {
            segment: write,
            offset: 0,
            stored_len: 0,
            codec: Codec::Raw,
            sum: 0,
            sectors: u8::try_from(sectors).unwrap(),
            skip: 0,
        }
    }

    proptest! {
        #[test]
        fn merging_is_inserting_in_order(
            runs in prop::collection::vec(
                prop::collection::vec((0u32..2, 0u64..60, 1u64..20), 0..12),
                0..5,
            ),
        ) {
            let mut oracle: ExtentMap<Place> = ExtentMap::new();
            let mut tables = Vec::new();
            let mut write = 0;
            for run in runs {
                let mut table = ExtentMap::new();
                for (disk, start, sectors) in run {
                    write += 1;
                    let extent = Extent::new(start, sectors);
                    table.insert(DiskNo(disk), extent, place(write, sectors));
                    oracle.insert(DiskNo(disk), extent, place(write, sectors));
                }
                tables.push(table);
            }
            let inputs = tables.iter().rev().map(|table| {
                table.iter().map(|(disk, extent, place)| Ok((disk, extent, *place)))
            });
            let mut merged: ExtentMap<Place> = ExtentMap::new();
            let mut last = (DiskNo(0), 0);
            for item in Merge::new(inputs).unwrap() {
                let (disk, extent, place) = item.unwrap();
                prop_assert!((disk, extent.start) >= last && extent.sectors > 0);
                last = (disk, extent.end());
                merged.insert(disk, extent, place);
            }
            for disk in 0..2 {
                for sector in 0..100 {
                    let at = Extent::new(sector, 1);
                    let of = |map: &ExtentMap<Place>| {
                        map.overlaps(DiskNo(disk), at).next().map(|(_, place)| place)
                    };
                    prop_assert_eq!(of(&merged), of(&oracle));
                }
            }
        }
    }
}
