//! All sequences of an engine, found by id in constant time, and lists of them in order of arrival.

use super::sequence::Sequence;

/// Names a sequence; ordered by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId {
    arrival: u64,
    /// Where it is kept; another one may be there later.
    place: u32,
}

/// All sequences. An id of one that was removed finds nothing.
#[derive(Debug, Default)]
pub(super) struct Sequences {
    places: Vec<Option<(SeqId, Sequence)>>,
    vacant: Vec<u32>,
    arrivals: u64,
}

/// Ids in order of arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ByArrival {
    ids: Vec<SeqId>,
}

impl Sequences {
    /// Takes one in; it is the youngest.
    pub(super) fn add(&mut self, sequence: Sequence) -> SeqId {
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() as u32 - 1
        });
        let id = SeqId { arrival: self.arrivals, place };
        self.arrivals += 1;
        self.places[place as usize] = Some((id, sequence));
        id
    }

    pub(super) fn get(&self, id: SeqId) -> Option<&Sequence> {
        let kept = self.places.get(id.place as usize)?.as_ref();
        kept.filter(|(own, _)| *own == id).map(|(_, sequence)| sequence)
    }

    pub(super) fn get_mut(&mut self, id: SeqId) -> Option<&mut Sequence> {
        let kept = self.places.get_mut(id.place as usize)?.as_mut();
        kept.filter(|(own, _)| *own == id).map(|(_, sequence)| sequence)
    }

    pub(super) fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        self.get(id)?;
        self.vacant.push(id.place);
        self.places[id.place as usize].take().map(|(_, sequence)| sequence)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.len() == self.vacant.len()
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SeqId, &Sequence)> {
        self.places.iter().flatten().map(|(id, sequence)| (*id, sequence))
    }
}

impl ByArrival {
    /// Puts an id to its place.
    pub(super) fn insert(&mut self, id: SeqId) {
        if let Err(place) = self.ids.binary_search(&id) {
            self.ids.insert(place, id);
        }
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, id: SeqId) -> bool {
        let found = self.ids.binary_search(&id);
        found.map(|place| self.ids.remove(place)).is_ok()
    }

    pub(super) fn get(&self, index: usize) -> Option<SeqId> {
        self.ids.get(index).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Oldest first.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = SeqId> {
        self.ids.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(arrival: u64, place: u32) -> SeqId {
        SeqId { arrival, place }
    }

    #[test]
    fn arrival_orders_ids_wherever_they_are_kept() {
        let mut list = ByArrival::default();
        [id(5, 0), id(2, 7), id(9, 1), id(2, 7)].into_iter().for_each(|id| list.insert(id));
        assert_eq!(list.iter().collect::<Vec<_>>(), [id(2, 7), id(5, 0), id(9, 1)]);
        assert!(list.remove(id(5, 0)) && !list.remove(id(5, 0)));
        assert_eq!((list.len(), list.get(1)), (2, Some(id(9, 1))));
    }
}
