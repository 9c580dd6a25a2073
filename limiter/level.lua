-- level: how many runs the fleet may have in progress, learnt from successes and refusals. Part of sync.lua.

local LONGEST_HALT = 16000000 -- us

-- Made only by a call that changes the level.
local function lesson()
  local learn = {}

  -- By threshold: after enough successes by a factor, and by one at least, so that 1 comes back. Additive
  -- growth is TCP's slow start up to just below what was refused: one per success. At the bound it is one per
  -- level's worth: a whole one, of runs that began there, has to go well before it is steep again. Runs that
  -- began together end together, so that less would prove nothing.
  local function grown()
    local level = state.level
    if state.additive == 1 then
      local at_bound = level >= state.bound and level < state.bound + 1
      return level + (at_bound and call.successes / level or call.successes)
    end
    if state.oks < state.threshold then return level end
    return math.max(level + 1, level * state.factor)
  end

  -- What was refused is tried again after so many levels' worths of successes, until then the level stays below
  -- it: the deeper the cut, the more a trial costs, and the most where growth jumps.
  local function rounds() return state.additive == 1 and 2 + 4 * (1 - state.backoff) or 6 end

  function learn.growth(ceiling)
    local level, bound = state.level, state.bound
    state.oks = state.oks + call.successes
    state.rounds = state.rounds + call.successes / level
    local higher = grown()
    if level < bound and higher >= bound then
      higher = state.rounds < rounds() and math.max(level, bound - 0.01) or bound
    end
    if higher <= level then return end
    higher = math.min(ceiling, higher)
    if higher >= ceiling or now - state.told >= CLIMB then trail().recovery(higher, ceiling) end
    state.level, state.oks = higher, 0
  end

  -- Where the level can fall no further and the refused come back: a second at first, twice as long each
  -- time. A refused run frees its slot at once, and the next one would be refused too.
  local function halt()
    state.halt = math.min(LONGEST_HALT, math.max(1000000, 2 * state.halt))
    trail().pause(state.halt, 'refused at the lowest level')
    state.pause = math.max(state.pause, now + state.halt)
  end

  -- Beside the refusal that cuts, those of the same spell cut nothing, but each is a run that did not fit: the
  -- bound falls by one, and stays above the level.
  function learn.did_not_fit(count)
    state.bound = math.min(state.bound, math.max(math.floor(state.level) + 1, state.bound - count))
  end

  -- A cut that follows another with no success between squares the factor, down to a half: from 40 to 5 by
  -- 0.9 are 4 refusals and not 20.
  function learn.cut(floor, ceiling)
    local before = state.level
    local factor = math.max(math.min(0.5, state.backoff), state.backoff ^ (2 ^ state.streak))
    if gate.refusals > 0 and state.streak > 0 and before <= floor and floor < ceiling then halt() end
    state.bound, state.rounds = math.floor(before), 0
    state.level = math.max(floor, before * factor)
    trail().cut(before)
    state.cut, state.oks, state.quiet, state.streak = state.attempt, 0, now, math.min(10, state.streak + 1)
    learn.did_not_fit(math.max(1, gate.refusals) - 1)
  end

  return learn
end

-- One cut per episode: only a run admitted after the last cut can cut again, or, after 30 s in which
-- none of those ended, any. Growth only while the level is what holds the fleet back. A reset that was asked
-- for has the last word.
local function adapt(in_use_before)
  local ceiling = gate.max
  if call.pause > 0 then
    trail().pause(call.pause, 'asked for by the provider')
    state.pause = math.max(state.pause, now + call.pause)
  end
  if in_use_before == 0 and state.admitted > 0 and now - state.admitted >= math.max(IDLE, state.window) then
    rules().reset_level(state, now, 'idle', me)
  end
  if call.refused > 0 and (call.refused > state.cut or now - state.quiet > 30000000) then
    lesson().cut(math.min(state.min, ceiling), ceiling)
  else
    if call.refused > 0 then lesson().did_not_fit(math.max(1, gate.refusals)) end
    if call.successes > 0 and call.counted_under == state.cut then
      state.quiet, state.streak, state.halt = now, 0, 0
      if in_use_before >= math.floor(state.level) and state.level < ceiling then lesson().growth(ceiling) end
    end
  end
  if call.reset then rules().reset_level(state, now, 'asked for', me) end
end
