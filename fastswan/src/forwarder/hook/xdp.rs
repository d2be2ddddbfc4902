//! XDP: the program runs on a frame as soon as an interface has received it.
//!
//! A link joins the program and an interface. The program stays attached until the last holder of the link is gone: a
//! descriptor of a process or a pin in a BPF file system.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use crate::sys::bpf;

/// A program that is loaded, and its number.
#[derive(Debug)]
pub(in super::super) struct Program {
    descriptor: OwnedFd,
    pub(in super::super) id: u32,
}

impl Program {
    pub(in super::super) fn new(descriptor: BorrowedFd<'_>, id: u32) -> io::Result<Self> {
        Ok(Self { descriptor: descriptor.try_clone_to_owned()?, id })
    }

    /// The program that is pinned at a path; `id` is its number.
    pub(in super::super) fn from_pin(path: &Path, id: u32) -> io::Result<Self> {
        Ok(Self { descriptor: bpf::from_pin(path)?, id })
    }

    pub(in super::super) fn pin(&self, path: &Path) -> io::Result<()> {
        bpf::pin(self.descriptor.as_fd(), path)
    }
}

/// What a link joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Joined {
    /// The number of the program.
    pub(in super::super) program: u32,
    /// The interface, wherever it is; `None` if it is gone or the program was taken off it.
    pub(in super::super) ifindex: Option<u32>,
}

/// A program's link to an interface.
#[derive(Debug)]
pub(in super::super) struct Link(OwnedFd);

impl Link {
    /// Attaches a program to an interface of this thread's network namespace that runs none.
    pub(in super::super) fn attach(program: &Program, ifindex: u32, generic: bool) -> io::Result<Self> {
        bpf::attach_xdp(program.descriptor.as_fd(), ifindex, generic).map(Self)
    }

    pub(in super::super) fn from_pin(path: &Path) -> io::Result<Self> {
        bpf::from_pin(path).map(Self)
    }

    pub(in super::super) fn pin(&self, path: &Path) -> io::Result<()> {
        bpf::pin(self.0.as_fd(), path)
    }

    pub(in super::super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Puts another program in the place of the one that runs, between two frames.
    pub(in super::super) fn replace(&self, program: &Program) -> io::Result<()> {
        bpf::replace_program(self.0.as_fd(), program.descriptor.as_fd())
    }

    /// Takes the program off the interface, whoever else holds the link. No frame meets it afterwards.
    pub(in super::super) fn detach(&self) -> io::Result<()> {
        bpf::detach(self.0.as_fd())
    }

    pub(in super::super) fn joined(&self) -> io::Result<Joined> {
        let info = bpf::link_info(self.0.as_fd())?;
        Ok(Joined { program: info.program, ifindex: Some(info.ifindex).filter(|ifindex| *ifindex != 0) })
    }
}
