//! The way in to the engine thread: a queue of commands that is emptied at once, so the thread takes one lock a step.
//!
//! Not a bounded channel, since nothing but a submission may be refused: those are bounded by `max_queue`, and the rest
//! by what they speak of (one release a call, one end a lease, two reports a pull).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Command;

/// Commands on their way to the engine thread.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    commands: Vec<Command>,
    is_swept: bool,
    is_shut: bool,
}

impl Inbox {
    /// Adds a command; gives it back once the engine has ended.
    pub(super) fn send(&self, command: Command) -> Result<(), Command> {
        let mut state = self.lock();
        if state.is_shut {
            return Err(command);
        }
        match command {
            // One is enough for any number of receivers that were dropped meanwhile.
            Command::Sweep if state.is_swept => return Ok(()),
            Command::Sweep => state.is_swept = true,
            Command::Submit(..)
            | Command::Release(_)
            | Command::EndLease(_)
            | Command::Mover(_)
            | Command::Drain => {}
        }
        state.commands.push(command);
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    /// Moves all commands to `into`; if there are none, waits for one up to `patience`.
    pub(super) fn take(&self, into: &mut Vec<Command>, patience: Duration) {
        let mut state = self.lock();
        if state.commands.is_empty() && !patience.is_zero() {
            let wait =
                self.arrived.wait_timeout_while(state, patience, |state| state.commands.is_empty());
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_swept = false;
        into.append(&mut state.commands);
    }

    /// Refuses everything from now on and gives what was not taken.
    pub(super) fn shut(&self) -> Vec<Command> {
        let mut state = self.lock();
        state.is_shut = true;
        std::mem::take(&mut state.commands)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_are_joined_until_they_are_taken() {
        let inbox = Inbox::default();
        let mut commands = Vec::new();
        for _ in 0..2 {
            assert!(inbox.send(Command::Sweep).is_ok() && inbox.send(Command::Sweep).is_ok());
            inbox.take(&mut commands, Duration::ZERO);
        }
        assert_eq!(commands.len(), 2);
    }

    #[test]
    fn a_shut_inbox_gives_back_what_it_holds_and_what_comes() {
        let inbox = Inbox::default();
        assert!(inbox.send(Command::Drain).is_ok());
        assert_eq!(inbox.shut().len(), 1);
        assert!(inbox.send(Command::Drain).is_err());
    }

    #[test]
    fn a_command_wakes_the_waiting_engine() {
        let inbox = std::sync::Arc::new(Inbox::default());
        let sender = std::sync::Arc::clone(&inbox);
        let thread = std::thread::spawn(move || sender.send(Command::Drain).is_ok());
        let mut commands = Vec::new();
        inbox.take(&mut commands, Duration::from_secs(60));
        assert_eq!(commands.len(), 1);
        assert!(thread.join().unwrap());
    }
}
